"""Options that every launch of a grouped kernel shares."""

from functools import cache

import torch
import triton


@cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Overlap of consecutive launches (programmatic dependent launch), where the device can."""
    if triton.knobs.runtime.interpret or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
