"""Host memory that the device reads directly."""

import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import torch

from deltazip_ray.residency.tiers import HostMemory

_READ_ONLY = 8
"""cudaHostRegisterReadOnly: a mapping that this process may not write cannot be registered otherwise."""

logger = logging.getLogger(__name__)


class PageLocks:
    """Memories registered with CUDA, each once in a process, until it is unmapped. Thread-safe."""

    _seen: ClassVar[weakref.WeakSet[HostMemory]] = weakref.WeakSet()
    _lock: ClassVar = threading.Lock()

    def ensure(self, memory: HostMemory) -> None:
        """Register ``memory`` unless that was tried before. Copies work without it, at a fraction of the speed."""
        with self._lock:
            if memory in self._seen:
                return
            self._seen.add(memory)
            address = np.frombuffer(memory.view, np.uint8).ctypes.data
            # CUDA keeps an error for the thread that had it and reports it there again, at a kernel's launch: this
            # thread ends with the error.
            with ThreadPoolExecutor(1) as thread:
                problem = thread.submit(_register, address, memory.view.nbytes, memory.view.readonly).result()
            if problem is None:
                # Runs before the memory is unmapped: views may outlive `memory`, but no load does.
                weakref.finalize(memory, _unregister, address).atexit = False
            else:
                logger.warning(
                    "%d MiB of host memory cannot be page-locked (%s): deltas are copied to the device through a "
                    "buffer of the driver, several times slower and not beside the steps",
                    memory.view.nbytes >> 20,
                    problem,
                )


def _register(address: int, size: int, read_only: bool) -> str | None:
    """Register memory; what is wrong when that does not work."""
    runtime = torch.cuda.cudart()
    result = runtime.cudaHostRegister(address, size, _READ_ONLY if read_only else 0)
    return None if int(result) == 0 else str(runtime.cudaGetErrorString(result))


def _unregister(address: int) -> None:
    result = torch.cuda.cudart().cudaHostUnregister(address)
    if int(result) != 0:
        logger.warning("host memory stays page-locked: %s", torch.cuda.cudart().cudaGetErrorString(result))
