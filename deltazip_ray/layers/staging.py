"""Copies arrays from the host to the device without waiting for the device's earlier work.

Small arrays are not page-locked: the driver puts their bytes into its command stream at once. A copy from page-locked
memory waits for a copy engine, and on an H200 that stays with a large delta's stream as long as there is work on it
(docs/tiers.md). Large arrays are page-locked: otherwise the host would wait until the device reaches the copy.
"""

from typing import Any

import torch
from numpy.typing import NDArray

_SMALL = 64 << 10
"""Bytes up to which CUDA does not wait for pageable memory. Behind large products, a page-locked copy of 40 or 60 KiB
took the host of an H200 3 to 4 ms, a pageable one 0.05."""


def staged(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """``values`` as a tensor to be copied to ``device``; the array may be changed once that copy is enqueued."""
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" and values.nbytes > _SMALL else host


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Enqueue the copy of ``values`` to ``device``; the array may be changed at once."""
    return staged(values, device).to(device, non_blocking=True)
