"""Long segments: the sum of base and delta in a scratch weight, and one product with it."""

import triton
from torch import Tensor

from deltazip_kernels.delta import LOW_RANK, RAW, PackedDelta
from deltazip_kernels.device.merge import merge
from deltazip_kernels.layout import GROUP, ROWS
from deltazip_kernels.table import CODEC_IDS

MERGE_ROWS = 384
"""From so many rows on a segment is cheaper over a merged weight than with a product beside the base's: measured on an
H200, where every linear of an 8B model breaks even between 256 and 384 rows (``docs/kernels.md``)."""


def merge_weight(base: Tensor, delta: PackedDelta, out: Tensor) -> None:
    """``out`` [N, K] = ``base`` + delta, rounded once to the type of ``out``; both contiguous, of the delta's shape.

    Costs a read of base and codes and a write of ``out``: for a segment of many rows less than a second product.
    Raises ValueError for tensors of another shape.
    """
    if base.shape != delta.shape or out.shape != delta.shape or not (base.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"base and scratch must be contiguous and of shape {delta.shape}")
    if delta.codec == RAW:
        out.copy_(base + delta.tensors["values"])
        return
    if delta.codec == LOW_RANK:
        out.copy_(base + delta.tensors["up"] @ delta.tensors["down"])
        return
    rows, columns = delta.shape
    extra = delta.tensors.get("index", delta.tensors.get("low", delta.tensors["codes"]))
    merge[(triton.cdiv(columns, 2 * GROUP), triton.cdiv(rows, ROWS))](
        out,
        base,
        delta.tensors["codes"],
        delta.tensors["scales"],
        extra,
        rows,
        K=columns,
        CODEC=CODEC_IDS[delta.codec],
        PLAIN=triton.knobs.runtime.interpret,
        num_warps=4,
    )
