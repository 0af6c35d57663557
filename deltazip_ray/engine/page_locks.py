"""Page-locks host memory, so that the device can read it directly."""

import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import torch

from deltazip_ray.residency.tiers import HostMemory

_READ_ONLY = 8
"""cudaHostRegisterReadOnly, without which a read-only mapping cannot be registered."""

logger = logging.getLogger(__name__)


class PageLocks:
    """Registers memory with CUDA, once per process, until it is unmapped. Thread-safe."""

    _seen: ClassVar[weakref.WeakSet[HostMemory]] = weakref.WeakSet()
    _lock: ClassVar = threading.Lock()

    def ensure(self, memory: HostMemory) -> None:
        """Register ``memory`` unless that was tried before. Without it copies work at a fraction of the speed."""
        with self._lock:
            if memory in self._seen:
                return
            self._seen.add(memory)
            address = np.frombuffer(memory.view, np.uint8).ctypes.data
            # In a thread of its own: CUDA reports an error again at the same thread's next kernel launch.
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
    """Register memory; returns the error, if any."""
    runtime = torch.cuda.cudart()
    result = runtime.cudaHostRegister(address, size, _READ_ONLY if read_only else 0)
    return None if int(result) == 0 else str(runtime.cudaGetErrorString(result))


def _unregister(address: int) -> None:
    result = torch.cuda.cudart().cudaHostUnregister(address)
    if int(result) != 0:
        logger.warning("host memory stays page-locked: %s", torch.cuda.cudart().cudaGetErrorString(result))
