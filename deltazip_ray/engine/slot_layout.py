"""The layout of a delta's tensors in a slot."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

from deltazip_kernels import RAW, packed_layout
from deltazip_ray.engine.uploads import Upload

ALIGNMENT = 256
"""Alignment of tensors in a slot, in bytes."""

_Key = TypeVar("_Key", bound=Hashable)


def aligned(size: int) -> int:
    """Bytes that a tensor of ``size`` bytes takes in a slot."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@lru_cache(1024)
def room(codec: str, shape: tuple[int, ...], dtype: torch.dtype, rank: int | None = None) -> int:
    """Bytes that a matrix takes in a slot; raw matrices and products of low ``rank`` are kept in ``dtype``."""
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

    Returns the copies, and the start of the next tensor. The copies are in the order of the originals' addresses: so
    tensors that are adjacent in a blob are adjacent here too (except in tiny models, whose sizes are not multiples of
    ALIGNMENT), and are copied in one piece.
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
    """Bytes that are contiguous in source and target."""

    first: torch.Tensor
    """The first tensor."""
    address: int
    start: int
    """Offset in the target."""
    size: int

    def grow(self, tensor: torch.Tensor, address: int, start: int) -> bool:
        """Append ``tensor`` and return True if it directly follows in source and target, in the same memory."""
        if self.address + self.size != address or self.start + self.size != start:
            return False
        if self.first.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            return False
        self.size += tensor.nbytes
        return True

    def bytes(self) -> torch.Tensor:
        """All the bytes."""
        return self.first.view(-1).view(torch.uint8).as_strided((self.size,), (1,))
