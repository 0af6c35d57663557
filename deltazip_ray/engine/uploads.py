"""Copies from the host to the device that do not delay steps.

On an idle engine, a load enqueues all of its copies itself: another thread would have to wait for the GIL again and
again, and the bus with it. While steps run, one thread makes the large copies of all loads in chunks, each after the
previous one is done, and sleeps in between: a copy engine that always has work on one stream starves the others
(docs/tiers.md). These copies have a stream of their own; small writes use another one.

A load ends when the device has finished all of it, which its thread waits for. So a version that is published after
that is complete for every later step on any stream, without events between streams. Earlier steps do not use the slot,
as all its pins have been returned. On a CPU the thread makes plain copies.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

from deltazip_ray.config import MIB
from deltazip_ray.engine.arrivals import Mark
from deltazip_ray.engine.page_locks import PageLocks
from deltazip_ray.residency.pace import Pace
from deltazip_ray.residency.tiers import HostMemory

CHUNK = 8 * MIB
"""Bytes of one copy while steps run."""
AHEAD = 2
"""Copies that a load requests before it waits while steps run, so that it does not compete with them for the GIL."""
_SWITCH_S = 0.0005
"""Switch interval of the GIL. Loads run Python for some milliseconds; the default of 5 ms would delay steps."""


class Copier:
    """Makes large copies. Thread-safe."""

    def __init__(self, device: torch.device, pace: Pace, chunk: int = CHUNK) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._chunk = chunk
        self._pace = pace
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deltazip-copy")

    @property
    def orders(self) -> bool:
        """Whether copies can be enqueued at once: on a GPU, without a speed limit."""
        return self.stream is not None and self._pace.unbounded

    def order(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue the copy of ``source`` to ``target``, both ``[bytes]`` uint8."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def submit(self, target: torch.Tensor, source: torch.Tensor) -> Future[None]:
        """Let the thread make the copy in chunks, in the order of the calls."""
        return self._thread.submit(self._copy, target, source)

    def event(self) -> torch.cuda.Event | None:
        """An event after all copies enqueued so far; None on a CPU."""
        return None if self.stream is None else _mark(self.stream)

    def mark(self) -> Mark:
        """A mark after all copies submitted so far."""
        return self._thread.submit(self.event)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self.stream):
            for start in range(0, source.numel(), self._chunk):
                part = slice(start, start + self._chunk)
                self._pace.take(min(self._chunk, source.numel() - start))
                target[part].copy_(source[part], non_blocking=True)
                if self.stream is not None:
                    _mark(self.stream).synchronize()


class Upload:
    """The device work of one load, used by one thread."""

    def __init__(self, copier: Copier, *, gently: bool = False) -> None:
        """``gently``: steps are running, and must not be delayed."""
        self._copier = copier
        self._gently = gently
        self._at_once = copier.orders and not gently
        self._copies: list[Future[None]] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` to ``target``, both ``[bytes]`` uint8; ``source`` must stay valid until the load ends.

        Launches in the same block see the bytes only after :meth:`join`.
        """
        if self._at_once:
            self._copier.order(target, source)
            return
        if self._gently and len(self._copies) >= AHEAD:
            self._copies[-AHEAD].result()
        self._copies.append(self._copier.submit(target, source))

    def mark(self) -> Mark:
        """A mark after the copies so far, including those of other loads."""
        if not self._at_once:
            return self._copier.mark()
        mark: Mark = Future()
        mark.set_result(self._copier.event())
        return mark

    def join(self) -> None:
        """Make later launches wait for the copies so far."""
        copies, self._copies = self._copies, []
        wait(copies)  # also for those after a failed one
        for copy in copies:
            copy.result()
        if self._copier.stream is not None:
            torch.cuda.current_stream(self._copier.stream.device).wait_stream(self._copier.stream)

    def drop(self) -> None:
        """Cancel the copies that have not started."""
        self._copies = [copy for copy in self._copies if not copy.cancel()]


class Uploads:
    """The device work of all loads. Thread-safe."""

    def __init__(self, device: torch.device, bytes_per_s: float | None = None, chunk: int = CHUNK) -> None:
        """``bytes_per_s`` limits all loads together; None: no limit."""
        self.copier = Copier(device, Pace(bytes_per_s), chunk)
        if device.type == "cuda":
            sys.setswitchinterval(min(_SWITCH_S, sys.getswitchinterval()))
        self.unbounded = bytes_per_s is None
        self._device = device
        self._locks = PageLocks()

    def lock_pages(self, memory: HostMemory) -> None:
        """Page-lock ``memory`` for as long as it lives; takes seconds for many gigabytes."""
        if self._device.type == "cuda":
            self._locks.ensure(memory)

    def event(self) -> torch.cuda.Event | None:
        """An event after the work on the current stream; None on a CPU."""
        return _mark(torch.cuda.current_stream(self._device)) if self._device.type == "cuda" else None

    @contextmanager
    def beside_steps(self, *, gently: bool = False) -> Iterator[Upload]:
        """The context of one load: however the block ends, its device work is finished then.

        ``gently``: steps are running, and must not be delayed.
        """
        upload = Upload(self.copier, gently=gently)
        rest = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with torch.cuda.stream(rest):
            try:
                yield upload
            except BaseException:
                upload.drop()
                raise
            finally:
                try:
                    upload.join()
                finally:
                    if rest is not None:
                        _mark(rest).synchronize()


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event after the work on ``stream``; waiting for it does not spin."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
