"""Long segments in one launch: a product with the sum of base and delta, which is made in registers tile by tile."""

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from deltazip_kernels.delta import PackedDelta
from deltazip_kernels.device.fused import BK, BN, BY, fused
from deltazip_kernels.fp8 import Fp8Matrix
from deltazip_kernels.launch import ceil_div, launch
from deltazip_kernels.layout import GROUP
from deltazip_kernels.table import CODEC_IDS

FUSED_CODECS = ("int4", "int2")
FUSED_ROWS, FUSED_ALONE_ROWS = 256, 64
"""From so many rows on a segment is cheaper by itself than within the base's product, with a delta's beside that: among
other rows, which keep the base's product, and without. Measured on an H200 (``docs/kernels.md``)."""
FUSED_HEIGHTS = (128, 256)
"""Rows of a tile, each with a kernel of its own."""
MOST_PARTS = 3
_NO_TILE = 1 << 30
_OCCUPIED = 0.9
_STAGES = 4
"""Steps under way at once: what fits into the shared memory."""


class FusedProduct:
    """``x (W + delta)^T`` for weights of one base. Launches of one object must not overlap: one stream at a time."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 0
        self._partials = torch.empty(0, device=device)
        self._arrived = torch.zeros(self._programs, dtype=torch.int32, device=device)
        """Programs that have left a part of a tile; zero between launches."""

    @property
    def available(self) -> bool:
        """Whether there is a GPU that the kernel is made for."""
        return self._programs > 0

    def __call__(self, y: Tensor, x: Tensor, weight: Tensor | Fp8Matrix, deltas: Sequence[PackedDelta | None]) -> bool:
        """Write ``y`` ``[T, N]`` for ``x`` ``[T, K]``, ``weight`` ``[N, K]`` and the deltas of its stacked linears.

        Returns whether it has: it takes a base in bfloat16 whose linears all have deltas of one of FUSED_CODECS and
        whole tiles, on a Hopper GPU.
        """
        present = [delta for delta in deltas if delta is not None and delta.shape[0] % BN.value == 0]
        if not self.available or not isinstance(weight, Tensor) or weight.dtype != torch.bfloat16:
            return False
        if len(present) != len(deltas) or len(present) > MOST_PARTS or weight.shape[1] % GROUP:
            return False
        codec = present[0].codec
        if codec not in FUSED_CODECS or any(delta.codec != codec for delta in present):
            return False
        self._launch(y, x, weight, present)
        return True

    def _launch(self, y: Tensor, x: Tensor, weight: Tensor, deltas: Sequence[PackedDelta]) -> None:
        (rows, columns), outputs = x.shape, len(weight)
        height = FUSED_HEIGHTS[rows > FUSED_HEIGHTS[0]]
        tiles = outputs // BN.value
        total = ceil_div(rows, height) * tiles * (columns // GROUP)
        programs = min(deal(ceil_div(rows, height) * tiles, self._programs), total)
        if self._partials.numel() < self._programs * height * BN.value:
            self._partials = torch.empty(self._programs * height * BN.value, device=x.device)
        padded = [*deltas, *[deltas[0]] * (MOST_PARTS - len(deltas))]
        second = deltas[0].shape[0] // BN.value if len(deltas) > 1 else _NO_TILE
        third = second + deltas[1].shape[0] // BN.value if len(deltas) > 2 else _NO_TILE
        launch(
            fused,
            (programs,),
            _descriptor(y, BY.value, BN.value),
            _descriptor(x, BY.value, BK.value),
            _descriptor(weight, BN.value, BK.value),
            tuple(delta.tensors["codes"].view(torch.int32) for delta in padded),
            tuple(delta.tensors["scales"] for delta in padded),
            second,
            third,
            self._partials,
            self._arrived,
            total,
            rows,
            columns,
            tiles,
            CODEC=CODEC_IDS[deltas[0].codec],
            BM=height,
            STAGES=_STAGES,
            num_warps=8,
        )


def deal(tiles: int, multiprocessors: int) -> int:
    """How many programs share ``tiles``: such that a tile is whole or cut evenly, where that occupies nearly all.

    Programs that walk along K side by side read what the others have just read.
    """
    if tiles <= multiprocessors:
        return tiles * (multiprocessors // tiles)
    whole = ceil_div(tiles, ceil_div(tiles, multiprocessors))
    return whole if whole >= _OCCUPIED * multiprocessors else multiprocessors


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """How the copy engine sees ``tensor``, in blocks of ``rows`` by ``columns``."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], layout)
