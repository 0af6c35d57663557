"""Options that launches share."""

from functools import cache

import torch
import triton


def ceil_div(value: int, step: int) -> int:
    """How many steps cover ``value``; Triton's own takes the host as long as a launch."""
    return -(-value // step)


def power_of_2(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length()


@cache
def overlap(device: torch.device, *, starts_early: bool = True) -> dict[str, bool]:
    """Programmatic dependent launch, where the GPU has it: a kernel is set up while the one ahead of it ends.

    The kernel itself says where it needs what others wrote (``device.locate.wait``). Large launches behind a GEMM of
    cuBLAS should not start early: that was slower on an H200 (``docs/kernels.md``).
    """
    if triton.knobs.runtime.interpret or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": starts_early}
