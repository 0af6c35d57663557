"""Long segments: one product with base and delta added up where they are multiplied, so that no sum is stored."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deltazip_kernels.device.fused import fused, reorder
from deltazip_kernels.layout import CODECS, GROUP
from deltazip_kernels.table import CODEC_IDS, DeltaTable


@dataclass(frozen=True)
class FusedTile:
    """``outputs`` and ``rows`` of a program, warps, depth of the pipeline; ``ordered``: x is reordered beforehand."""

    outputs: int
    rows: int
    warps: int
    stages: int
    ordered: bool = False


DEFAULT = FusedTile(128, 128, 8, 3)


def can_fuse(table: DeltaTable, slot: int, x: Tensor) -> bool:
    """Whether :func:`fused_matmul` serves a slot: packed codecs in all parts, bf16, an even number of whole groups."""
    plain = triton.knobs.runtime.interpret
    packed = all(codec in CODECS for codec in table.codecs_of(slot))
    return packed and x.shape[1] % (2 * GROUP) == 0 and (plain or x.dtype == torch.bfloat16)


def fused_matmul(
    y: Tensor, x: Tensor, base: Tensor, table: DeltaTable, slot: int, tile: FusedTile | None = None
) -> None:
    """``y`` [T, sum of N] = ``x`` [T, K] @ (``base`` + the slot's deltas).T, each weight rounded once to its type.

    ``base`` [sum of N, K] is contiguous; rows of x and y have adjacent columns. Raises ValueError where
    :func:`can_fuse` says no, and for other shapes.
    """
    rows = tuple(width for width, _ in table.shapes)
    if base.shape != (sum(rows), x.shape[1]) or not base.is_contiguous() or y.shape != (len(x), sum(rows)):
        raise ValueError(f"base must be contiguous {(sum(rows), x.shape[1])} and y {(len(x), sum(rows))}")
    if not can_fuse(table, slot, x) or base.dtype != x.dtype:
        raise ValueError(
            f"deltas {table.codecs_of(slot)} of K = {x.shape[1]}, {x.dtype} are not fused: merge the weight"
        )
    tile = tile or DEFAULT
    if tile.ordered:
        ordered = torch.empty_like(x)
        reorder[(x.numel() // x.shape[1] * (x.shape[1] // 256),)](x, ordered, SIZE=256, num_warps=1)
        x = ordered
    tiles = tuple(triton.cdiv(width, tile.outputs) for width in rows)
    codecs = {CODEC_IDS[codec] for codec in table.codecs_of(slot) if codec}
    fused[(triton.cdiv(len(x), tile.rows), sum(tiles))](
        y,
        y.stride(0),
        x,
        x.stride(0),
        len(x),
        base,
        table.entries,
        slot,
        ROWS=rows,
        TILES=tiles,
        K=x.shape[1],
        CODECS=tuple(sorted(codecs)),
        BN=tile.outputs,
        BM=tile.rows,
        STAGES=tile.stages,
        NATURAL=not tile.ordered,
        PLAIN=triton.knobs.runtime.interpret,
        num_warps=tile.warps,
    )
