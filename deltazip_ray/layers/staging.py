"""Small arrays from the host to the device, without waiting for what it has yet to do.

They are not page-locked: the driver takes a small array along with its commands, at once, while a copy from page-locked
memory waits for a copy engine, which on an H200 stays with the stream of a large delta for as long as that has work
(docs/tiers.md). Neither waits for the stream.
"""

from typing import Any

import torch
from numpy.typing import NDArray


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """``values`` on ``device``, behind the work that is queued there; the array may change at once."""
    return torch.from_numpy(values).to(device, non_blocking=True)
