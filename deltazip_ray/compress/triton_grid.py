"""The functions of ``grid`` as GPU kernels: one launch for a group instead of thousands.

The results equal those of the torch functions, except for values that rounding puts between two codes.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from deltazip_kernels.layout import GROUP, Codec
from deltazip_ray.compress.device import grid as device
from deltazip_ray.compress.grid import CLIP_RATIOS, REFITS, Coded

ROWS = 16
"""Rows of a program: values, codes and errors of 16 × 128 elements take 48 registers of each of its 128 threads."""


def round_to_nearest(delta: Tensor, weights: Tensor, codec: Codec) -> Coded:
    """As ``grid.round_to_nearest``."""
    rows, columns = delta.shape
    groups = -(-columns // GROUP)
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=delta.device)
    kept = torch.empty((rows, columns), dtype=torch.bool, device=delta.device) if codec.sparse else None
    scales = torch.empty((rows, groups), device=delta.device)
    device.nearest[(triton.cdiv(rows, ROWS), groups)](
        delta, delta.stride(0), weights.contiguous(), codes, _bytes(kept), scales, rows, columns, **_options(codec)
    )
    return Coded(codes, scales, kept)


def code_group(work: Tensor, codes: Tensor, kept: Tensor | None, factor: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """As ``grid.code_group``."""
    rows, columns = work.shape
    scales, errors = torch.empty(rows, device=work.device), torch.empty((rows, columns), device=work.device)
    device.code_group[(triton.cdiv(rows, ROWS),)](
        work,
        work.stride(0),
        factor,
        *factor.stride(),
        codes,
        codes.stride(0),
        _bytes(kept),
        0 if kept is None else kept.stride(0),
        scales,
        errors,
        rows,
        columns,
        **_options(codec),
    )
    return scales, errors


def improve_group(
    delta: Tensor, lost: Tensor, codes: Tensor, scales: Tensor, slopes: Tensor, metric: Tensor, codec: Codec
) -> None:
    """As ``grid.improve_group``."""
    rows, columns = codes.shape
    options = _options(codec)
    del options["CLIPS"], options["REFITS"], options["SPARSE"]
    device.improve_group[(triton.cdiv(rows, ROWS),)](
        delta,
        delta.stride(0),
        lost,
        lost.stride(0),
        codes,
        codes.stride(0),
        scales,
        scales.stride(0),
        slopes,
        slopes.stride(0),
        metric,
        metric.stride(0),
        rows,
        columns,
        **options,
    )


def _bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as kernels write it."""
    return None if mask is None else mask.view(torch.uint8)


def _options(codec: Codec) -> dict[str, Any]:
    return {
        "ZERO": codec.zero,
        "TOP": float(2**codec.bits - 1),
        "CLIPS": len(CLIP_RATIOS),
        "REFITS": REFITS,
        "SPARSE": codec.sparse,
        "ROWS": ROWS,
        "num_warps": 4,
    }
