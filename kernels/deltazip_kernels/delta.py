"""What a grouped delta product works on: packed matrices and the table of segments."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltazip_kernels.layout import check_packed

RAW = "raw"
"""The codec of a delta that is stored as it is: one tensor ``values`` ``[N, K]``."""


@dataclass(frozen=True)
class PackedDelta:
    """One weight matrix of one version's delta, ``shape`` ``[N, K]``; ValueError if the tensors are not laid out so."""

    codec: str
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.codec != RAW:
            check_packed(self.codec, self.tensors, self.shape)
        elif set(self.tensors) != {"values"} or tuple(self.tensors["values"].shape) != self.shape:
            raise ValueError(f"a raw delta {self.shape} has one tensor of that shape, named values")


@dataclass(frozen=True)
class Segments:
    """Which rows of a batch belong to which slot; rows that no segment covers belong to the base.

    ``starts`` ``[S + 1]`` int32, ascending: rows ``starts[i]:starts[i + 1]`` belong to ``slots[i]`` (``[S]`` int32).
    Slot -1 means the base. Segments may be empty.
    """

    starts: Tensor
    slots: Tensor

    def __post_init__(self) -> None:
        if self.starts.shape != (self.slots.numel() + 1,):
            raise ValueError(f"{self.slots.numel()} segments need one start more, not {self.starts.numel()}")
        if self.starts.dtype != torch.int32 or self.slots.dtype != torch.int32:
            raise ValueError("a segment table is int32")
