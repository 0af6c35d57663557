"""Shared memory for deltas: the node store writes it, replicas on the host map it read-only.

The file has no name: other processes of the same user reach it through ``/proc/<pid>/fd``. So the memory is freed with
the last process that maps it, however that process ends, and no file is left behind.
"""

import mmap
import os
import tempfile
import uuid
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from deltazip_ray.errors import ConfigError, StoreUnavailable


@dataclass(frozen=True)
class ArenaRef:
    """How to reach an arena from another process of the host."""

    pid: int
    fd: int
    size: int
    life: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Distinguishes this arena from earlier ones with the same numbers."""


class Arena:
    """Writable shared memory of a fixed size in bytes, allocated at once."""

    def __init__(self, folder: Path, size: int) -> None:
        try:
            with tempfile.TemporaryFile(dir=folder, prefix="deltazip-arena-") as file:
                # Allocated now: with a sparse file, running out of memory later would kill the writing process.
                os.posix_fallocate(file.fileno(), 0, size)
                self.buffer = memoryview(mmap.mmap(file.fileno(), size))
                fd = os.dup(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"{folder} has no room for an arena of {size >> 20} MiB ({error.strerror}): "
                "lower node_store.arena_bytes, or increase the shared memory of the host or pod"
            ) from error
        weakref.finalize(self, os.close, fd)
        self.ref = ArenaRef(os.getpid(), fd, size)


def map_arena(ref: ArenaRef) -> memoryview:
    """Map another process's arena read-only; the mapping lives as long as any view of it. Raises StoreUnavailable."""
    try:
        fd = os.open(f"/proc/{ref.pid}/fd/{ref.fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreUnavailable(
            f"the node store's memory cannot be mapped ({error.strerror}): is it restarting?"
        ) from error
    try:
        if os.fstat(fd).st_size != ref.size:
            raise StoreUnavailable("the node store's memory has another size than announced: is it restarting?")
        return memoryview(mmap.mmap(fd, ref.size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED))
    finally:
        os.close(fd)
