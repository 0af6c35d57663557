"""Small arrays from the host to the device, without waiting for what it has yet to do."""

from typing import Any

import torch
from numpy.typing import NDArray


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """``values`` on ``device``; to a GPU by way of page-locked memory, behind the work that is queued there."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
