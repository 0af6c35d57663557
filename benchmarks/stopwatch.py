"""Time and memory of parts of a program."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch


class Stopwatch:
    """Seconds and largest GPU memory by stage; a stage's clock stops while another that it calls runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: list[str] = ["the rest"]
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, int] = defaultdict(int)
        """Bytes."""
        self._since = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._note()
        self._running.append(name)
        try:
            yield
        finally:
            self._note()
            self._running.pop()

    def _note(self) -> None:
        running = self._running[-1]
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            self.peaks[running] = max(self.peaks[running], torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.seconds[running] += now - self._since
        self._since = now

    def watch(self, owner: Any, function: str, name: str) -> Callable[[], None]:
        """Clock calls of ``function``; returns what undoes that."""
        inner = getattr(owner, function)

        @wraps(inner)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return inner(*args, **kwargs)

        setattr(owner, function, clocked)
        return lambda: setattr(owner, function, inner)
