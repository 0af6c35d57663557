"""Kernels are compiled again after a failure, and put on the device one at a time, whoever launches them first."""

import inspect
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import _async_compile

from deltazip_kernels import launch


class Kernel(CompiledKernel):
    """One whose load takes a moment between its parts, as on a device."""

    inside = Lock()

    def __init__(self) -> None:
        self.name, self.src = "kernel", None
        self.module = self.function = self._run = None


def load(kernel: Kernel) -> None:
    """As Triton does, which looks once whether it was done."""
    if kernel.function is None:
        assert kernel.inside.acquire(blocking=False), "another thread imports what launches its kernel"
        time.sleep(0.001)
        kernel._run = "launcher"
        time.sleep(0.001)
        kernel.function = "function"
        kernel.inside.release()


def as_triton_launches(kernel: Kernel) -> tuple[Any, Any]:
    """What ``JITFunction.run`` asks for, in its order."""
    kernel.launch_metadata((1,), 0)
    return kernel.run, kernel.function


@pytest.mark.parametrize("first", [as_triton_launches, launch._load])
def test_threads_get_whole_kernels_and_load_one_at_a_time(first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_init_handles", load)
    kernels = [Kernel() for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        loads = pool.map(first, kernels)
        found = list(pool.map(as_triton_launches, kernels * 4))
        list(loads)
    assert set(found) == {("launcher", "function")}


class Function:
    """A Triton function with its cache; the first compilation fails."""

    def __init__(self) -> None:
        self.device_caches: dict[int, tuple[dict[str, Any]]] = {0: ({},)}
        self.tries = 0

    def run(self, *, grid: object, warmup: bool) -> Any:
        (kernels,) = self.device_caches[0]
        if "key" not in kernels:
            callbacks = [lambda kernel: kernels.update(key=kernel), lambda _: kernels.clear()]
            mode = _async_compile.active_mode.get()
            count = len(inspect.signature(mode.submit).parameters) - 2
            kernels["key"] = mode.submit("key", self.compile, *callbacks[:count])
        return kernels["key"]

    def compile(self) -> Kernel:
        self.tries += 1
        if self.tries == 1:
            raise OSError("no space left in the cache")
        return Kernel()


def test_what_was_not_compiled_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 3.7 Triton keeps the failed future in its cache, and its mode in the thread."""
    monkeypatch.setattr(launch, "_init_handles", load)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    function = Function()
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(OSError, match="no space"), launch.compiling(pool):
            launch.launch(function, (1,))
        for _ in range(2):
            with launch.compiling(pool):
                launch.launch(function, (1,))
    assert function.device_caches[0][0]["key"].function == "function"
    assert function.tries == 2


@triton.jit
def _sum(out, a, b, c) -> None:
    tl.store(out, a + 10.0 * b + 100.0 * c)


@pytest.mark.gpu
def test_first_launches_beside_loads() -> None:
    values = (3, 2.5, 5 << 40)
    cases = list(itertools.product(values, repeat=3))
    out = torch.zeros(len(cases), 2, dtype=torch.float64, device="cuda")
    kernels = [_sum.warmup(out, *case, grid=(1,)) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(launch._load, kernel) for kernel in kernels]
        for row, case in enumerate(cases):
            launch.launch(_sum, (1,), out[row], *case)
        for load in loads:
            load.result()
    wanted = [a + 10 * b + 100 * c for a, b, c in cases]
    torch.testing.assert_close(out[:, 0].cpu(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0)
