"""Kernels are put on the device one at a time, whoever launches them first."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import pytest
from triton.compiler import CompiledKernel

from deltazip_kernels import launch


class Kernel(CompiledKernel):
    """One whose load takes a moment between its parts, as on a device."""

    inside = Lock()

    def __init__(self) -> None:
        self.module = self.function = self._run = None

    def _init_handles(self) -> None:
        if self.function is None:
            assert self.inside.acquire(blocking=False), "another thread imports what launches its kernel"
            time.sleep(0.001)
            self._run = "launcher"
            time.sleep(0.001)
            self.function = "function"
            self.inside.release()


def as_triton_launches(kernel: Kernel) -> tuple[Any, Any]:
    """What ``JITFunction.run`` reads, in its order."""
    return kernel.run, kernel.function


@pytest.mark.parametrize("first", [as_triton_launches, launch._load])
def test_threads_get_whole_kernels_and_load_one_at_a_time(first: Any) -> None:
    kernels = [Kernel() for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        loads = pool.map(first, kernels)
        found = list(pool.map(as_triton_launches, kernels * 4))
        list(loads)
    assert set(found) == {("launcher", "function")}
