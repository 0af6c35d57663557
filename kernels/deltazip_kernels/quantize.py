"""Rounds activations to int8, once per input, with columns in the order of packed tiles.

Either as a pass of its own, or fused into the one that makes the input: a norm, or the gated activation.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deltazip_kernels.device.quantize import gated, norm, quantize
from deltazip_kernels.fp8 import Fp8Matrix, empty_fp8
from deltazip_kernels.launch import ceil_div, launch, overlap, power_of_2
from deltazip_kernels.layout import GROUP

MAX_COLUMNS = 256 * GROUP
"""The longest row that fits the registers of one program."""
_SHARED_ROWS = {"STEP": 16, "num_warps": 8}
"""Options of programs that share rows: 2,048 columns each."""


@dataclass(frozen=True)
class QuantizedRows:
    """``values`` [T, padded K] int8 in position order, ``scales`` [T] float32: ``x = values * scale``.

    If the launch was told to round only some first rows to int8, both have only these. Rounding moves a value by at
    most 1/254 of the largest magnitude of its row.
    """

    values: Tensor
    scales: Tensor
    columns: int
    fp8: Fp8Matrix | None = None
    """All rows in e4m3 as well, if the launch was asked for them."""


def quantize_rows(x: Tensor, *, fp8: bool = False, int8: int | None = None) -> QuantizedRows:
    """Round ``x`` [T, K] to int8, with one scale a row (symmetric, half up). Raises ValueError beyond MAX_COLUMNS.

    Here and below, ``fp8`` asks for all rows in e4m3 too, and ``int8`` limits how many first rows become int8.
    """
    rows, arguments, options = _empty(x, x.shape[1], fp8=fp8, int8=int8)
    count = x.shape[0] if fp8 or int8 is None else int8
    if count:
        launch(quantize, (count,), x, x.stride(0), *arguments, **options)
    return rows


def silu_mul_quantize(gate_up: Tensor, *, fp8: bool = False, int8: int | None = None) -> tuple[Tensor, QuantizedRows]:
    """``silu(gate) * up`` [T, K] of ``gate_up`` [T, 2 K], in its type and rounded."""
    return _gated(gate_up, gelu=False, fp8=fp8, int8=int8)


def gelu_mul_quantize(gate_up: Tensor, *, fp8: bool = False, int8: int | None = None) -> tuple[Tensor, QuantizedRows]:
    """The same with the tanh approximation of gelu (Gemma)."""
    return _gated(gate_up, gelu=True, fp8=fp8, int8=int8)


def rms_norm_quantize(
    x: Tensor,
    weights: Tensor,
    which: Tensor,
    epsilon: float,
    residual: Tensor | None = None,
    *,
    offset: bool = False,
    fp8: bool = False,
    int8: int | None = None,
) -> tuple[Tensor, QuantizedRows]:
    """Llama's RMS norm of ``x`` [T, K], in its type and rounded; row ``t`` is scaled by ``weights[which[t]]``.

    ``weights`` is [versions, K], ``which`` [T] int32. With ``residual`` [T, K], ``x`` is first added to it in place,
    and the sum is normed. With ``offset`` the factor is ``1 + weights`` (Gemma).
    """
    return _norm(x, weights, None, which, epsilon, residual, offset=offset, fp8=fp8, int8=int8)


def layer_norm_quantize(
    x: Tensor,
    weights: Tensor,
    biases: Tensor,
    which: Tensor,
    epsilon: float,
    residual: Tensor | None = None,
    *,
    fp8: bool = False,
    int8: int | None = None,
) -> tuple[Tensor, QuantizedRows]:
    """Layer norm, likewise, with ``biases`` [versions, K] (GPT-NeoX)."""
    return _norm(x, weights, biases, which, epsilon, residual, offset=False, fp8=fp8, int8=int8)


def _gated(gate_up: Tensor, *, gelu: bool, fp8: bool, int8: int | None) -> tuple[Tensor, QuantizedRows]:
    """If only some rows become int8, as beside long prompts, these are rounded by a launch of their own.

    Then no program of the first one needs a whole row, and more of them can share it.
    """
    columns = gate_up.shape[1] // 2
    out = gate_up.new_empty((gate_up.shape[0], columns))
    apart = not fp8 and int8 is not None and int8 < len(out)
    rows, arguments, options = _empty(gate_up, columns, fp8=fp8, int8=0 if apart else int8)
    if apart:
        options = options | _SHARED_ROWS
    if out.shape[0]:
        grid = (out.shape[0], ceil_div(options["GROUPS"], options["STEP"]))
        gated[grid](gate_up, gate_up.stride(0), out, *arguments, GELU=gelu, **options)
    return out, quantize_rows(out, int8=int8) if apart else rows


def _norm(
    x: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    which: Tensor,
    epsilon: float,
    residual: Tensor | None,
    *,
    offset: bool,
    fp8: bool,
    int8: int | None,
) -> tuple[Tensor, QuantizedRows]:
    rows, arguments, options = _empty(x, x.shape[1], fp8=fp8, int8=int8)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.shape[0]:
        sums = x if residual is None else residual
        norm[(x.shape[0],)](
            x,
            x.stride(0),
            sums,
            sums.stride(0),
            weights,
            weights if biases is None else biases,
            which,
            epsilon,
            out,
            *arguments,
            RESIDUAL=residual is not None,
            CENTER=biases is not None,
            OFFSET=offset,
            **options,
        )
    return out, rows


def _empty(
    x: Tensor, columns: int, *, fp8: bool, int8: int | None
) -> tuple[QuantizedRows, tuple[Tensor | int, ...], dict[str, Any]]:
    """Memory for the rounded rows of ``x``, the same as kernel arguments, and the options of a launch of a program a
    row."""
    options = _options(columns, fp8, x.device)
    values, scales = _nothing(columns, x.device)
    if int8 is None:
        int8 = x.shape[0]
    if int8:
        values = values.new_empty((int8, values.shape[1]))
        scales = scales.new_empty(int8)
    other = empty_fp8(x.shape[0], columns, x.device) if fp8 else None
    fp8_arguments = (other.values, other.scales) if other else (scales, scales)
    rows = QuantizedRows(values, scales, columns, other)
    return rows, (int8, values, scales, *fp8_arguments, columns), options


@cache
def _nothing(columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Values and scales of no rows."""
    values = torch.empty((0, -(-columns // GROUP) * GROUP), dtype=torch.int8, device=device)
    return values, torch.empty(0, dtype=torch.float32, device=device)


@cache
def _options(columns: int, fp8: bool, device: torch.device) -> dict[str, Any]:
    if columns > MAX_COLUMNS:
        raise ValueError(f"rows of {columns} columns are too long: at most {MAX_COLUMNS}")
    groups = -(-columns // GROUP)
    step = power_of_2(groups)
    warps = next(warps for warps, most in ((4, 8), (8, 32), (16, 128), (32, 256)) if step <= most)
    return {"GROUPS": groups, "STEP": step, "FP8": fp8, "num_warps": warps} | overlap(device)
