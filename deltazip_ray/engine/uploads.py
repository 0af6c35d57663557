"""Copies from the host to the device, beside the steps and never in their way.

One thread makes the large copies of all loads, in chunks and on a stream of its own, while each load's own thread goes
on to its next blob and does the rest on another stream. No more chunks are under way than keep the wire busy; the
thread sleeps meanwhile instead of holding the interpreter. A copy engine that always finds work on one stream lets
others wait without end (docs/tiers.md), so the wire is left free for a moment after each run of chunks: after each
chunk while steps run, whose own copies are small.

A load ends when the device has done all of it, which its thread waits for. So what is published after that is complete
for every step launched later, on whatever stream, without an event between the streams. What was launched before does
not use the slot, for the slot's pins are back. On a CPU the same thread makes plain copies.
"""

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from deltazip_ray.config import MIB
from deltazip_ray.engine.arrivals import Mark
from deltazip_ray.engine.page_locks import PageLocks
from deltazip_ray.residency.pace import Pace
from deltazip_ray.residency.tiers import HostMemory

CHUNK = 64 * MIB
"""Bytes of one copy."""
DEPTH = 4
"""Copies under way at once: 5 ms, so that the wire stays busy while other threads have the interpreter."""
RUN = 1024 * MIB
"""Bytes after which the wire is left free for a moment."""
GENTLE = 8 * MIB
"""Bytes of one copy beside steps, and of one run."""
AHEAD = 20
GENTLY_AHEAD = 2
"""Copies that a load asks for before it waits: its work between them takes the interpreter from copier and steps."""
_SWITCH_S = 0.0005
"""Threads take turns at the interpreter. Loads are Python for some milliseconds; Python's own 5 would delay steps."""


class Copier:
    """The thread that makes large copies, in the order in which they were asked for. Thread-safe."""

    def __init__(self, device: torch.device, pace: Pace, chunk: int = CHUNK) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.chunk = chunk
        self._pace = pace
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deltazip-copy")
        self._under_way: deque[torch.cuda.Event] = deque()
        self._run = 0
        """Bytes since the wire was free."""

    def submit(self, target: torch.Tensor, source: torch.Tensor, *, gently: bool) -> Future[None]:
        """Have ``source`` copied to ``target``, both ``[bytes]`` uint8; ``gently``: beside steps.

        Done means: the device has been told.
        """
        return self._thread.submit(self._copy, target, source, gently=gently)

    def mark(self) -> Mark:
        """A mark behind all copies that were asked for so far."""
        return self._thread.submit(lambda: None if self.stream is None else _mark(self.stream))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, *, gently: bool) -> None:
        chunk = min(self.chunk, GENTLE) if gently else self.chunk
        with torch.cuda.stream(self.stream):
            for start in range(0, source.numel(), chunk):
                part = slice(start, start + chunk)
                self._pace.take(min(chunk, source.numel() - start))
                self._leave_room(chunk if gently else RUN)
                target[part].copy_(source[part], non_blocking=True)
                self._run += chunk
                if self.stream is not None:
                    self._under_way.append(_mark(self.stream))

    def _leave_room(self, run: int) -> None:
        """Before a chunk: wait until there are few others, and when they are a long run, until there are none."""
        most = DEPTH - 1
        if self._run >= run:
            self._run = most = 0
        while len(self._under_way) > most:
            self._under_way.popleft().synchronize()


class Upload:
    """The device work of one load, in one thread."""

    def __init__(self, copier: Copier, *, gently: bool = False) -> None:
        self._copier = copier
        self._gently = gently
        self._copies: list[Future[None]] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Have ``source`` copied to ``target``, both ``[bytes]`` uint8; ``source`` must stay until the load ends.

        What is launched in the same block sees the bytes after :meth:`join` only.
        """
        ahead = GENTLY_AHEAD if self._gently else AHEAD
        if len(self._copies) >= ahead:
            self._copies[-ahead].result()
        self._copies.append(self._copier.submit(target, source, gently=self._gently))

    def mark(self) -> Mark:
        """What comes when the copies so far, and those of other loads, have been ordered."""
        return self._copier.mark()

    def join(self) -> None:
        """Let what is launched from now on wait for the copies so far."""
        copies, self._copies = self._copies, []
        for copy in copies:
            copy.result()
        if self._copier.stream is not None:
            torch.cuda.current_stream(self._copier.stream.device).wait_stream(self._copier.stream)

    def drop(self) -> None:
        """Leave out the copies that have not begun."""
        self._copies = [copy for copy in self._copies if not copy.cancel()]


class Uploads:
    """Where loads do their device work. Thread-safe."""

    def __init__(self, device: torch.device, bytes_per_s: float | None = None, chunk: int = CHUNK) -> None:
        """``bytes_per_s`` bounds all loads together; None: as fast as the wires."""
        self.copier = Copier(device, Pace(bytes_per_s), chunk)
        if device.type == "cuda":
            sys.setswitchinterval(min(_SWITCH_S, sys.getswitchinterval()))
        self.unbounded = bytes_per_s is None
        self._device = device
        self._locks = PageLocks()

    def lock_pages(self, memory: HostMemory) -> None:
        """Let the device read ``memory`` directly, once and for as long as it lives; seconds for many gigabytes."""
        if self._device.type == "cuda":
            self._locks.ensure(memory)

    def event(self) -> torch.cuda.Event | None:
        """An event behind what is on the current stream; None on a CPU."""
        return _mark(torch.cuda.current_stream(self._device)) if self._device.type == "cuda" else None

    @contextmanager
    def beside_steps(self, *, gently: bool = False) -> Iterator[Upload]:
        """Around one load: what the block does on the device is done when the block ends, however it ends.

        ``gently``: steps run meanwhile, and come first.
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
    """An event behind all that is on ``stream``; a thread that waits for it sleeps."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
