"""Arrays from the host to the device, without waiting for what it has yet to do.

Small ones are not page-locked: the driver takes them along with its commands, at once, while a copy from page-locked
memory waits for a copy engine, which on an H200 stays with the stream of a large delta for as long as that has work
(docs/tiers.md). Large ones are: for them the driver would let the host wait until the device has come so far.
"""

from typing import Any

import torch
from numpy.typing import NDArray

_SMALL = 64 << 10
"""Bytes that CUDA promises to take along. Page-locked ones of 40 or 60 KiB cost an H200's host 3 to 4 ms behind large
products, others 0.05."""


def staged(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """``values`` in the best form for sending to ``device``; the original may be changed once the copy is enqueued."""
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" and values.nbytes > _SMALL else host


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Enqueue the copy of ``values`` to ``device``; the array may be changed at once."""
    return staged(values, device).to(device, non_blocking=True)
