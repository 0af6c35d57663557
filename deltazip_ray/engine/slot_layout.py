"""How the tensors of a delta lie in a slot."""

import math
from collections.abc import Hashable, Mapping
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
    runs: list[tuple[int, torch.Tensor]] = []
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        source = tensor.view(-1).view(torch.uint8)
        copies[key] = memory[start : start + len(source)].view(tensor.dtype).view(tensor.shape)
        if runs and runs[-1][0] + len(runs[-1][1]) == start and _follows(runs[-1][1], source):
            begin, before = runs[-1]
            runs[-1] = begin, before.as_strided((len(before) + len(source),), (1,))
        else:
            runs.append((start, source))
        start += aligned(len(source))
    for begin, source in runs:
        upload.copy(memory[begin : begin + len(source)], source)
    return copies, start


def _follows(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the bytes of ``second`` come right after those of ``first`` in one piece of memory."""
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return same and first.data_ptr() + len(first) == second.data_ptr()
