"""How the tensors of a delta lie in a slot."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

from deltazip_kernels import RAW, packed_layout
from deltazip_ray.engine.uploads import Upload

ALIGNMENT = 256
"""Bytes; what a tensor in a slot starts at a multiple of."""

_Key = TypeVar("_Key", bound=Hashable)


def aligned(size: int) -> int:
    """Bytes of a slot that a tensor of ``size`` bytes takes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@lru_cache(1024)
def room(codec: str, shape: tuple[int, ...], dtype: torch.dtype, rank: int | None = None) -> int:
    """Bytes of a slot that one matrix takes; raw ones and products of a low ``rank`` are kept in ``dtype``."""
    if codec == RAW:
        return aligned(math.prod(shape) * dtype.itemsize)
    if rank is not None:
        return sum(aligned(rank * size * dtype.itemsize) for size in shape)
    layout = packed_layout(codec, (shape[0], shape[1]))
    return sum(aligned(math.prod(dims) * part.itemsize) for dims, part in layout.values())


def fill(
    memory: torch.Tensor, start: int, tensors: Mapping[_Key, torch.Tensor], upload: Upload
) -> tuple[dict[_Key, torch.Tensor], int]:
    """Copy contiguous ``tensors`` to ``memory``, ``[bytes]`` uint8, from ``start`` on.

    Returns the copies, and where the next tensor may begin. They lie in the order of the originals' addresses, so that
    neighbours in a blob, whose sizes are multiples of ALIGNMENT but in tiny models, are neighbours here too, and are
    copied in one piece.
    """
    copies: dict[_Key, torch.Tensor] = {}
    runs: list[_Run] = []
    typed = {dtype: memory.view(dtype) for dtype in {tensor.dtype for tensor in tensors.values()}}
    begin = memory.storage_offset()
    for address, key in sorted((tensor.data_ptr(), key) for key, tensor in tensors.items()):
        tensor = tensors[key]
        size = tensor.nbytes
        copies[key] = typed[tensor.dtype].as_strided(tensor.shape, tensor.stride(), (begin + start) // tensor.itemsize)
        if not runs or not runs[-1].grow(tensor, address, start):
            runs.append(_Run(tensor, address, start, size))
        start += aligned(size)
    for run in runs:
        upload.copy(memory[run.start : run.start + run.size], run.bytes())
    return copies, start


@dataclass
class _Run:
    """Bytes that lie in one piece on both sides."""

    first: torch.Tensor
    """The tensor that they begin with."""
    address: int
    start: int
    """Where they go."""
    size: int

    def grow(self, tensor: torch.Tensor, address: int, start: int) -> bool:
        """Take in ``tensor``, if it comes right after these bytes on both sides, in the same memory."""
        if self.address + self.size != address or self.start + self.size != start:
            return False
        if self.first.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            return False
        self.size += tensor.nbytes
        return True

    def bytes(self) -> torch.Tensor:
        """All of them."""
        return self.first.view(-1).view(torch.uint8).as_strided((self.size,), (1,))
