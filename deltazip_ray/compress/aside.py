"""Frees GPU memory for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def aside(*tensors: Tensor) -> Iterator[None]:
    """Moves ``tensors`` to the host for the duration of the block; they must not be read meanwhile."""
    there = [tensor for tensor in tensors if tensor.is_cuda]
    waiting = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor) for tensor in there]
    sizes = [tensor.untyped_storage().nbytes() for tensor in there]
    for tensor in there:
        tensor.untyped_storage().resize_(0)
    try:
        yield
    finally:
        for tensor, size, values in zip(there, sizes, waiting, strict=True):
            tensor.untyped_storage().resize_(size)
            tensor.copy_(values)
