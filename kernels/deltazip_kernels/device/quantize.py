"""The kernels behind ``deltazip_kernels.quantize``.

A program holds one row in registers: GROUPS groups of 128 columns, padded to STEP, a power of two.
"""

import triton
import triton.language as tl

SMALLEST = tl.constexpr(1e-30)
"""A row whose largest magnitude is below this counts as zero: its inverse scale would overflow."""


@triton.jit
def _columns(STEP: tl.constexpr):
    """Columns [STEP groups, 128] of a row: a shape in which neighbouring threads read neighbouring columns."""
    return tl.arange(0, STEP)[:, None] * 128 + tl.arange(0, 128)[None, :]


@triton.jit
def _store_rounded(values, scales, v, GROUPS: tl.constexpr, STEP: tl.constexpr):
    """Row ``v`` [STEP, 128], zero beyond its columns, to int8 in position order and its scale."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.max(tl.reshape(tl.abs(v), (STEP * 128,)), axis=0)
    live = top > SMALLEST
    inverse = tl.where(live, 127.0 / tl.where(live, top, 1.0), 0.0)
    tl.store(scales + row, tl.where(live, top / 127.0, 0.0))
    q = tl.reshape(tl.floor(v * inverse + 0.5).to(tl.int8), (STEP, 32, 4))
    q = tl.reshape(tl.permute(q, (0, 2, 1)), (STEP, 128))
    position = _columns(STEP)
    tl.store(values + row * (GROUPS * 128) + position, q, mask=position < GROUPS * 128)


@triton.jit
def quantize(x, x_stride, values, scales, K, GROUPS: tl.constexpr, STEP: tl.constexpr):
    """``x`` as it is."""
    column = _columns(STEP)
    v = tl.load(x + tl.program_id(0).to(tl.int64) * x_stride + column, mask=column < K, other=0.0)
    _store_rounded(values, scales, v.to(tl.float32), GROUPS, STEP)


@triton.jit
def silu_mul(x, x_stride, out, values, scales, K, GROUPS: tl.constexpr, STEP: tl.constexpr):
    """``out = silu(x[:, :K]) * x[:, K:]``, each factor rounded to the type of ``x``, and ``out`` quantized."""
    row = tl.program_id(0).to(tl.int64)
    column = _columns(STEP)
    inside = column < K
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + K + column, mask=inside, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(x.dtype.element_ty).to(tl.float32)
    product = (gate * up).to(x.dtype.element_ty)
    tl.store(out + row * K + column, product, mask=inside)
    _store_rounded(values, scales, product.to(tl.float32), GROUPS, STEP)


@triton.jit
def rms_norm(
    x,
    x_stride,
    residual,
    residual_stride,
    weights,
    which,
    epsilon,
    out,
    values,
    scales,
    K,
    RESIDUAL: tl.constexpr,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
):
    """``out = norm(x) * weights[which[row]]``, quantized too; with RESIDUAL of ``residual += x`` instead of ``x``."""
    row = tl.program_id(0).to(tl.int64)
    column = _columns(STEP)
    inside = column < K
    kind = x.dtype.element_ty
    v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weights + tl.load(which + row).to(tl.int64) * K + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        sums = residual + row * residual_stride + column
        total = (v + tl.load(sums, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(sums, total, mask=inside)
        v = total.to(tl.float32)
    mean = tl.sum(tl.reshape(v * v, (STEP * 128,)), axis=0) / K
    normed = ((v * tl.rsqrt(mean + epsilon)).to(kind).to(tl.float32) * w).to(kind)
    tl.store(out + row * K + column, normed, mask=inside)
    _store_rounded(values, scales, normed.to(tl.float32), GROUPS, STEP)
