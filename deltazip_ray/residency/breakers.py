"""A circuit breaker per version, so that a broken one costs nobody time or bandwidth.

After ``failures`` failures in a row the breaker opens: callers get the last error at once. When the back-off is over,
the next caller is the probe: it tries, while the others still get the error. A successful probe closes the breaker. A
failed one doubles the back-off up to a maximum, minus some jitter so that hosts do not return to the store in step, but
waits at least as long as the store asked for (up to the maximum too). If a probe is cancelled, the next caller probes.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from deltazip_ray.config import BreakerConfig
from deltazip_ray.errors import ArtifactError, StoreError, StoreFull

logger = logging.getLogger(__name__)

_REMEMBERED = 4096
"""Versions at most; the one that has been silent for the longest time is forgotten first."""


@dataclass
class _Trouble:
    """A version whose last attempt failed. Times are seconds of the breakers' clock."""

    error: ArtifactError | StoreError
    failed_at: float
    failures: int = 0
    """In a row."""
    retry_at: float | None = None
    """None while the breaker is closed."""
    probing: bool = False


class Breakers:
    """The breakers of all versions. Belongs to one event loop."""

    def __init__(
        self,
        config: BreakerConfig,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``clock`` gives seconds that never go back, ``chance`` numbers from 0 to 1."""
        self._config = config
        self._clock = clock
        self._chance = chance
        self._troubles: dict[str, _Trouble] = {}  # the one that failed least recently first
        self.refusals = 0
        """Callers that got an error without an attempt, since the start."""

    @property
    def open(self) -> int:
        """Versions whose breakers are open."""
        return sum(trouble.retry_at is not None for trouble in list(self._troubles.values()))

    @contextmanager
    def guard(self, version: str) -> Iterator[None]:
        """Guards one attempt. Raises the last error again when the breaker is open.

        ArtifactError and StoreError count as failures, except StoreFull, which is not the version's fault. Callers that
        share one failed attempt count as one failure.
        """
        probe = self._admit(version)
        began = self._clock()
        try:
            yield
        except (ArtifactError, StoreError) as error:
            if not isinstance(error, StoreFull):
                self._failed(version, began, error)
            raise
        else:
            self._troubles.pop(version, None)
        finally:
            if probe is not None:
                probe.probing = False

    def _admit(self, version: str) -> _Trouble | None:
        """Admit an attempt, or raise; returns the trouble that the attempt probes, if any."""
        trouble = self._troubles.get(version)
        if trouble is None or trouble.retry_at is None:
            return None
        wait_s = trouble.retry_at - self._clock()
        if wait_s > 0 or trouble.probing:
            self.refusals += 1
            raise _again(trouble, max(0.0, wait_s))
        trouble.probing = True
        return trouble

    def _failed(self, version: str, began: float, error: ArtifactError | StoreError) -> None:
        now = self._clock()
        trouble = self._troubles.pop(version, None)
        if trouble is None:
            trouble = _Trouble(error, failed_at=began)
        self._troubles[version] = trouble
        if len(self._troubles) > _REMEMBERED:
            del self._troubles[next(iter(self._troubles))]
        if began < trouble.failed_at:
            return
        trouble.error, trouble.failed_at = error, now
        trouble.failures += 1
        if trouble.failures in (1, self._config.failures):
            logger.warning("version %s has failed %d times: %s", version[:12], trouble.failures, error.message)
        beyond = trouble.failures - self._config.failures
        if beyond >= 0:
            longest = min(self._config.backoff_s * 2.0 ** min(beyond, 30), self._config.backoff_max_s)
            asked = (error.retry_after_s or 0.0) if isinstance(error, StoreError) else 0.0
            trouble.retry_at = now + max(longest * (1 - self._chance() / 2), min(asked, self._config.backoff_max_s))


def _again(trouble: _Trouble, wait_s: float) -> ArtifactError | StoreError:
    """A copy of the error: one object raised many times would accumulate all the tracebacks."""
    error = trouble.error
    if isinstance(error, ArtifactError):
        return type(error)(error.message)
    again = type(error)(f"{error.message} (failed {trouble.failures} times in a row, next try in {wait_s:.1f} s)")
    again.retry_after_s = wait_s
    return again
