"""Launches Triton kernels, or only compiles them; and the options that launches share."""

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
from triton.runtime import _async_compile

_compiled: ContextVar[list[tuple[Any, Any]] | None] = ContextVar("compiled", default=None)
"""Each function and the kernel compiled from it so far; None outside of a block of :func:`compiling`."""
_loading = threading.Lock()


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Launch a Triton ``kernel``; in a block of :func:`compiling`, only have it compiled."""
    compiled = _compiled.get()
    made = kernel.run(*arguments, grid=grid, warmup=compiled is not None, **options)
    if compiled is not None:
        compiled.append((kernel, made))


@contextmanager
def compiling(pool: Executor) -> Iterator[None]:
    """In this block, :func:`launch` only has kernels compiled, each once, by the threads of ``pool``.

    Nothing runs, so outputs are undefined. At the end of the block all kernels are on the device. Tracing a kernel,
    about a fourth of the work, holds the GIL; the rest does not. Raises what made a compilation fail; a later block
    tries again.
    """
    compiled: list[tuple[Any, Any]] = []
    try:
        with triton.AsyncCompileMode(pool):
            before = _compiled.set(compiled)
            try:
                yield
            finally:
                _compiled.reset(before)
        if not triton.knobs.runtime.interpret:
            list(pool.map(_load, {made for _, made in compiled}))
    except BaseException:
        _async_compile.active_mode.set(None)
        for function, made in compiled:
            _forget_failed(function, made)
        raise


def _forget_failed(function: Any, made: Any) -> None:
    """Drop ``made`` from Triton's cache if it was not compiled: up to 3.7 every later launch would raise the error."""
    if hasattr(made, "result") and made.kernel is None:
        for kernels, *_ in function.device_caches.values():
            for key in [key for key, kernel in list(kernels.items()) if kernel is made]:
                del kernels[key]


def _load(kernel: Any) -> None:
    """Put a kernel on the device, and build its launcher, for which some versions of Triton run a C compiler."""
    made = kernel.result() if hasattr(kernel, "result") else kernel
    made._init_handles()


_init_handles = CompiledKernel._init_handles


def _init_alone(kernel: Any) -> None:
    """``CompiledKernel._init_handles``, which puts a kernel on the device, for one thread at a time.

    Up to 3.6 Triton imports every kernel's launcher as a module of the same name and looks it up afterwards, so that
    concurrent threads may get each other's.
    """
    if kernel.function is None:
        with _loading:
            _init_handles(kernel)


CompiledKernel._init_handles = _init_alone


def ceil_div(value: int, step: int) -> int:
    """``value / step``, rounded up. ``triton.cdiv`` takes the host as long as a launch."""
    return -(-value // step)


def power_of_2(value: int) -> int:
    """``value``, rounded up to a power of two."""
    return 1 << (value - 1).bit_length()


@cache
def overlap(device: torch.device, *, starts_early: bool = True) -> dict[str, bool]:
    """Options for programmatic dependent launch, where the GPU has it: a kernel starts while the one ahead ends.

    The kernel itself waits before it reads what others wrote (``device.locate.wait``). Large launches behind a GEMM
    should not start early, which was slower on an H200 (``docs/kernels-tried.md``).
    """
    if triton.knobs.runtime.interpret or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": starts_early}
