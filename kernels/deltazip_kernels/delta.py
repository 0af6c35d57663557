"""The operands of a grouped delta product: packed matrices and the table of segments."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltazip_kernels.layout import check_packed

RAW = "raw"
"""The codec of a delta that is stored as it is: one tensor ``values`` ``[N, K]``."""
LOW_RANK = "low_rank"
"""The codec of a delta ``up @ down`` (LoRA is one): tensors ``down`` ``[R, K]`` and ``up`` ``[N, R]``."""
MAX_RANK = 128


@dataclass(frozen=True)
class PackedDelta:
    """The delta of one weight matrix ``[N, K]`` of one version. Raises ValueError unless ``tensors`` fit the codec."""

    codec: str
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.codec not in (RAW, LOW_RANK):
            check_packed(self.codec, self.tensors, self.shape)
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if self.codec == RAW:
            if shapes != {"values": self.shape}:
                raise ValueError(f"a raw delta {self.shape} has one tensor of that shape, named values")
        else:
            rank = shapes.get("down", (0,))[0]
            if not 1 <= rank <= MAX_RANK or shapes != {"down": (rank, self.shape[1]), "up": (self.shape[0], rank)}:
                raise ValueError(f"a low-rank delta {self.shape} has down [R, K] and up [N, R] with R in 1..{MAX_RANK}")


@dataclass(frozen=True)
class Segments:
    """Assigns the rows of a batch to slots: ``starts[i]:starts[i + 1]`` belong to ``slots[i]``.

    ``starts`` ``[S + 1]`` int32 ascends, ``slots`` is ``[S]`` int32. Slot -1 is the base, to which rows outside of all
    segments belong too. Segments may be empty.
    """

    starts: Tensor
    slots: Tensor

    def __post_init__(self) -> None:
        if self.starts.shape != (self.slots.numel() + 1,):
            raise ValueError(f"{self.slots.numel()} segments need one start more, not {self.starts.numel()}")
        if self.starts.dtype != torch.int32 or self.slots.dtype != torch.int32:
            raise ValueError("a segment table is int32")
