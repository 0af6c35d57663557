"""How the tensors of a delta lie in a slot."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
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
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        size, offset = tensor.nbytes, memory.storage_offset() + start
        copies[key] = typed[tensor.dtype].as_strided(tensor.shape, tensor.stride(), offset // tensor.itemsize)
        run = _Run(tensor, start, size)
        if runs and runs[-1].goes_on_with(run):
            runs[-1].size += size
        else:
            runs.append(run)
        start += aligned(size)
    for run in runs:
        upload.copy(memory[run.start : run.start + run.size], run.bytes())
    return copies, start


@dataclass
class _Run:
    """Bytes that lie in one piece on both sides."""

    first: torch.Tensor
    """The tensor that they begin with."""
    start: int
    """Where they go."""
    size: int

    def goes_on_with(self, other: "_Run") -> bool:
        """Whether the bytes of ``other`` come right after these, in the same memory."""
        adjacent = self.first.data_ptr() + self.size == other.first.data_ptr()
        if not adjacent or self.start + self.size != other.start:
            return False
        return self.first.untyped_storage().data_ptr() == other.first.untyped_storage().data_ptr()

    def bytes(self) -> torch.Tensor:
        """All of them."""
        return self.first.view(-1).view(torch.uint8).as_strided((self.size,), (1,))
