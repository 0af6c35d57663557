"""Copies from the host to the device, beside the steps and never in their way.

On CUDA a load works on streams of its own: one for its large copies, in chunks, and one for all else, which does not
wait for their end. No more chunks are under way than keep the wire busy; the load's thread sleeps meanwhile instead of
holding the interpreter. The load ends when the device has done all of it, which the thread waits for. So what is
published after that is complete for every step launched later, on whatever stream, without an event between the
streams. What was launched before does not use the slot, for the slot's pins are back. Elsewhere copies are plain ones.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deltazip_ray.config import MIB
from deltazip_ray.engine.page_locks import PageLocks
from deltazip_ray.residency.pace import Pace
from deltazip_ray.residency.tiers import HostMemory

CHUNK = 4 * MIB
"""Bytes of one copy: 80 microseconds; smaller ones are slower (docs/tiers.md)."""
DEPTH = 4
"""Copies of one load under way at once. A step's own small copy waits for them: for 64 MiB most of a millisecond."""


class Upload:
    """The device work of one load, in one thread."""

    def __init__(self, pace: Pace, stream: torch.cuda.Stream | None, chunk: int = CHUNK) -> None:
        """``stream`` None: copies are done when :meth:`copy` returns."""
        self._pace = pace
        self._stream = stream
        self._chunk = chunk
        self._under_way: deque[torch.cuda.Event] = deque()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` to ``target``, both ``[bytes]`` uint8; ``source`` must stay as it is until the load ends.

        What is launched in the same block sees the bytes after :meth:`join` only.
        """
        for start in range(0, len(source), self._chunk):
            part = slice(start, start + self._chunk)
            self._pace.take(len(source[part]))
            if self._stream is None:
                target[part].copy_(source[part])
                continue
            if len(self._under_way) == DEPTH:
                self._under_way.popleft().synchronize()
            with torch.cuda.stream(self._stream):
                target[part].copy_(source[part], non_blocking=True)
            self._under_way.append(_mark(self._stream))

    def join(self) -> None:
        """Let what is launched from now on wait for the copies so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class Uploads:
    """Where loads do their device work. Thread-safe."""

    def __init__(self, device: torch.device, bytes_per_s: float | None = None, chunk: int = CHUNK) -> None:
        """``bytes_per_s`` bounds all loads together; None: as fast as the wires."""
        self._cuda = device.type == "cuda"
        self._device = device
        self._pace = Pace(bytes_per_s)
        self._chunk = chunk
        self._locks = PageLocks()

    def lock_pages(self, memory: HostMemory) -> None:
        """Let the device read ``memory`` directly, once and for as long as it lives; seconds for many gigabytes."""
        if self._cuda:
            self._locks.ensure(memory)

    @contextmanager
    def beside_steps(self) -> Iterator[Upload]:
        """Around one load: what the block does on the device is done when the block ends, however it ends."""
        if not self._cuda:
            yield Upload(self._pace, None, self._chunk)
            return
        copies, rest = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        with torch.cuda.stream(rest):
            upload = Upload(self._pace, copies, self._chunk)
            try:
                yield upload
            finally:
                upload.join()
                _mark(rest).synchronize()


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event behind all that is on ``stream``; a thread that waits for it sleeps."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
