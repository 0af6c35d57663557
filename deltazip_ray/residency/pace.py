"""A limit on bytes per second, shared by threads."""

import threading
import time
from collections.abc import Callable


class Pace:
    """A token bucket: bytes may be moved as they are taken, in bursts of a tenth of a second. Thread-safe."""

    def __init__(
        self,
        bytes_per_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``bytes_per_s`` None: no limit. ``clock`` gives seconds that never go back."""
        self._rate = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._paid_until = clock()

    @property
    def unbounded(self) -> bool:
        """Whether there is no limit."""
        return self._rate is None

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes may be moved. Callers are served in order of arrival."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            start = max(self._paid_until, now - _BURST_S)
            self._paid_until = start + size / self._rate
        if start > now:
            self._sleep(start - now)


_BURST_S = 0.1
