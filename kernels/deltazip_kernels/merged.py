"""Adds a delta to the base's weight in scratch memory, so that a long segment needs only one product."""

import torch
import triton
from torch import Tensor

from deltazip_kernels.delta import LOW_RANK, RAW, PackedDelta
from deltazip_kernels.device.merge import merge
from deltazip_kernels.fp8 import Fp8Matrix
from deltazip_kernels.launch import ceil_div, launch
from deltazip_kernels.layout import GROUP, ROWS
from deltazip_kernels.table import CODEC_IDS

MERGE_ROWS = 384
"""A segment of at least this many rows is cheaper over a merged weight than with two products. On an H200 every linear
of an 8B model breaks even between 256 and 384 rows (``docs/kernels.md``)."""


def merge_weight(base: Tensor | Fp8Matrix, delta: PackedDelta, out: Tensor) -> None:
    """Write ``base`` + delta to ``out`` [N, K], rounded once to its type. Both are contiguous, of the delta's shape.

    The sum with a base in fp8 is not rounded to fp8, which would lose much of the delta.
    Raises ValueError for tensors of another shape.
    """
    values = base.values if isinstance(base, Fp8Matrix) else base
    if values.shape != delta.shape or out.shape != delta.shape or not (values.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"base and scratch must be contiguous and of shape {delta.shape}")
    if delta.codec in (RAW, LOW_RANK):
        dense = base.dequantize(out.dtype) if isinstance(base, Fp8Matrix) else base
        parts = delta.tensors
        torch.add(dense, parts["values"] if delta.codec == RAW else parts["up"] @ parts["down"], out=out)
        return
    rows, columns = delta.shape
    extra = delta.tensors.get("index", delta.tensors.get("low", delta.tensors["codes"]))
    launch(
        merge,
        (ceil_div(columns, 2 * GROUP), ceil_div(rows, ROWS)),
        out,
        values,
        base.scales if isinstance(base, Fp8Matrix) else values,
        delta.tensors["codes"],
        delta.tensors["scales"],
        extra,
        rows,
        K=columns,
        CODEC=CODEC_IDS[delta.codec],
        SCALED=isinstance(base, Fp8Matrix),
        PLAIN=triton.knobs.runtime.interpret,
        num_warps=4,
    )
