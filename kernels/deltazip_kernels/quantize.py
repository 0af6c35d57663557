"""Activations to int8, once per input, in the order in which packed tiles store their columns."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deltazip_kernels.device.quantize import quantize
from deltazip_kernels.layout import GROUP

_STEP = 128  # groups of a row that a program holds in registers


@dataclass(frozen=True)
class QuantizedRows:
    """``values`` [T, padded K] int8 in position order, ``scales`` [T] float32: ``x = values * scale``."""

    values: Tensor
    scales: Tensor
    columns: int


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Quantize ``x`` [T, K] to int8, one scale a row (symmetric, round half up), columns in position order.

    The rounding moves a value by at most 1/254 of the largest magnitude of its row.
    """
    rows, columns = x.shape
    groups = -(-columns // GROUP)
    values = torch.empty((rows, groups * GROUP), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        step = min(triton.next_power_of_2(groups), _STEP)
        quantize[(rows,)](x, x.stride(0), values, scales, columns, groups, step, num_warps=16 if step > 32 else 8)
    return QuantizedRows(values, scales, columns)
