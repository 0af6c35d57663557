"""Options that launches share."""

from functools import cache

import torch
import triton


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Programmatic dependent launch, where the GPU has it: a kernel is set up while the one ahead of it ends.

    A kernel that is launched so says itself where it needs what others wrote (``device.locate.wait``).
    """
    if triton.knobs.runtime.interpret or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
