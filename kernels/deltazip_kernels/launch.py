"""How kernels are launched, or only compiled, and the options that launches share."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

_compiled: ContextVar[list[Any] | None] = ContextVar("compiled", default=None)
"""What was compiled so far, in a block of :func:`compiling`."""
_loading = threading.Lock()


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Launch a Triton ``kernel``; in a block of :func:`compiling`, only have it compiled."""
    compiled = _compiled.get()
    made = kernel.run(*arguments, grid=grid, warmup=compiled is not None, **options)
    if compiled is not None:
        compiled.append(made)


@contextmanager
def compiling(pool: Executor) -> Iterator[None]:
    """Compile what this thread launches in the block, each kernel once, by the threads of ``pool``; at its end all are
    on the device.

    Nothing runs: results are undefined. Triton traces a kernel in the interpreter, a fourth or so of the time; the rest
    is done without it.
    """
    compiled: list[Any] = []
    with triton.AsyncCompileMode(pool):
        before = _compiled.set(compiled)
        try:
            yield
        finally:
            _compiled.reset(before)
    if not triton.knobs.runtime.interpret:
        list(pool.map(_load, set(compiled)))


def _load(kernel: Any) -> None:
    """Have a kernel on the device, and what launches it, which for some versions of Triton takes a C compiler."""
    made = kernel.result() if hasattr(kernel, "result") else kernel
    made._init_handles()


_init_handles = CompiledKernel._init_handles


def _init_alone(kernel: Any) -> None:
    """``CompiledKernel._init_handles``, which puts a kernel on the device, as threads need it: one at a time.

    Up to 3.6 Triton imports what launches a kernel as a module of one name for all kernels and reads it afterwards, so
    that threads beside each other may get another kernel's.
    """
    if kernel.function is None:
        with _loading:
            _init_handles(kernel)


CompiledKernel._init_handles = _init_alone


def ceil_div(value: int, step: int) -> int:
    """How many steps cover ``value``; Triton's own takes the host as long as a launch."""
    return -(-value // step)


def power_of_2(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length()


@cache
def overlap(device: torch.device, *, starts_early: bool = True) -> dict[str, bool]:
    """Programmatic dependent launch, where the GPU has it: a kernel is set up while the one ahead of it ends.

    The kernel itself says where it needs what others wrote (``device.locate.wait``). Large launches behind a GEMM
    should not start early: that was slower on an H200 (``docs/kernels.md``).
    """
    if triton.knobs.runtime.interpret or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": starts_early}
