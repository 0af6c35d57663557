"""Room on a GPU for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def aside(tensor: Tensor) -> Iterator[None]:
    """Within, the values of ``tensor`` wait on the host and take no memory of its GPU; nobody may look at them."""
    if not tensor.is_cuda:
        yield
        return
    storage = tensor.untyped_storage()
    size, waiting = storage.nbytes(), torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    waiting.copy_(tensor)
    storage.resize_(0)
    try:
        yield
    finally:
        storage.resize_(size)
        tensor.copy_(waiting)
