"""Copies from the host to the device, beside the steps and never in their way.

A load on an idle engine orders its copies itself, all at once: another thread would have to wait for the interpreter
again and again, and the wire with it. While steps run, a thread makes the large copies of all loads in chunks, each
when the one before is done, and sleeps meanwhile: a copy engine that always finds work on one stream lets others wait
without end (docs/tiers.md). These copies have a stream of their own; what is small goes on another one.

A load ends when the device has done all of it, which its thread waits for. So what is published after that is complete
for every step launched later, on whatever stream, without an event between the streams. What was launched before does
not use the slot, for the slot's pins are back. On a CPU the thread makes plain copies.
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
"""Bytes of one copy beside steps."""
AHEAD = 2
"""Copies that a load beside steps asks for before it waits: its work between them takes the interpreter from theirs."""
_SWITCH_S = 0.0005
"""Threads take turns at the interpreter. Loads are Python for some milliseconds; Python's own 5 would delay steps."""


class Copier:
    """Makes large copies. Thread-safe."""

    def __init__(self, device: torch.device, pace: Pace, chunk: int = CHUNK) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._chunk = chunk
        self._pace = pace
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deltazip-copy")

    @property
    def orders(self) -> bool:
        """Whether copies can be ordered at once: by a device, and without a bound."""
        return self.stream is not None and self._pace.unbounded

    def order(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Tell the device to copy ``source`` to ``target``, both ``[bytes]`` uint8, behind the copies so far."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def submit(self, target: torch.Tensor, source: torch.Tensor) -> Future[None]:
        """Have the same copied in chunks by the thread, in the order in which copies are asked for."""
        return self._thread.submit(self._copy, target, source)

    def event(self) -> torch.cuda.Event | None:
        """An event behind what was ordered so far; None on a CPU."""
        return None if self.stream is None else _mark(self.stream)

    def mark(self) -> Mark:
        """A mark behind all copies that the thread was asked for so far."""
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
    """The device work of one load, in one thread."""

    def __init__(self, copier: Copier, *, gently: bool = False) -> None:
        """``gently``: beside steps, which come first."""
        self._copier = copier
        self._gently = gently
        self._at_once = copier.orders and not gently
        self._copies: list[Future[None]] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Have ``source`` copied to ``target``, both ``[bytes]`` uint8; ``source`` must stay until the load ends.

        What is launched in the same block sees the bytes after :meth:`join` only.
        """
        if self._at_once:
            self._copier.order(target, source)
            return
        if self._gently and len(self._copies) >= AHEAD:
            self._copies[-AHEAD].result()
        self._copies.append(self._copier.submit(target, source))

    def mark(self) -> Mark:
        """What comes when the copies so far, and those of other loads, have been ordered."""
        if not self._at_once:
            return self._copier.mark()
        mark: Mark = Future()
        mark.set_result(self._copier.event())
        return mark

    def join(self) -> None:
        """Let what is launched from now on wait for the copies so far."""
        copies, self._copies = self._copies, []
        wait(copies)  # for those behind one that failed, too
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
