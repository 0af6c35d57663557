"""The kernels behind ``deltazip_kernels.quantize``.

A program holds one row in registers: GROUPS groups of 128 columns, padded to STEP, a power of two. It writes the row in
int8, for deltas, if it is one of the first ``int8``, and with FP8 also in e4m3, for a base in fp8. All let the next
launch start at once. They read norm weights and ``which`` before they wait, so the launch ahead must not write these.
"""

import triton
import triton.language as tl

from deltazip_kernels.device.locate import let_next_start, wait

SMALLEST = tl.constexpr(1e-30)
"""A row whose largest magnitude is below this becomes zero, as its inverse scale would overflow."""
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def _columns(STEP: tl.constexpr):
    """Columns [STEP, 128] of a row, in a shape in which neighbouring threads read neighbouring columns."""
    return tl.arange(0, STEP)[:, None] * 128 + tl.arange(0, 128)[None, :]


@triton.jit
def _store_rounded(
    int8, values, scales, fp8, fp8_scales, v, K, GROUPS: tl.constexpr, STEP: tl.constexpr, FP8: tl.constexpr
):  # fmt: skip
    """Store row ``v`` [STEP, 128], zero beyond K, and its scales: int8 in position order, e4m3 in column order."""
    row = tl.program_id(0).to(tl.int64)
    position = _columns(STEP)
    top = tl.max(tl.reshape(tl.abs(v), (STEP * 128,)), axis=0)
    live = top > SMALLEST
    if row < int8:
        inverse = tl.where(live, 127.0 / tl.where(live, top, 1.0), 0.0)
        tl.store(scales + row, tl.where(live, top / 127.0, 0.0))
        q = tl.reshape(tl.floor(v * inverse + 0.5).to(tl.int8), (STEP, 32, 4))
        q = tl.reshape(tl.permute(q, (0, 2, 1)), (STEP, 128))
        tl.store(values + row * (GROUPS * 128) + position, q, mask=position < GROUPS * 128)
    if FP8:
        inverse = tl.where(live, FP8_MAX / tl.where(live, top, 1.0), 0.0)
        tl.store(fp8_scales + row, tl.where(live, top / FP8_MAX, 0.0))
        tl.store(fp8 + row * K + position, (v * inverse).to(tl.float8e4nv), mask=position < K)


@triton.jit(do_not_specialize=["int8"])
def quantize(
    x,
    x_stride,
    int8,
    values,
    scales,
    fp8,
    fp8_scales,
    K,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    FP8: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Round the rows of ``x``."""
    let_next_start(OVERLAP)
    wait(OVERLAP)
    column = _columns(STEP)
    v = tl.load(x + tl.program_id(0).to(tl.int64) * x_stride + column, mask=column < K, other=0.0)
    _store_rounded(int8, values, scales, fp8, fp8_scales, v.to(tl.float32), K, GROUPS, STEP, FP8)


@triton.jit(do_not_specialize=["int8"])
def gated(
    x,
    x_stride,
    out,
    int8,
    values,
    scales,
    fp8,
    fp8_scales,
    K,
    GELU: tl.constexpr,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    FP8: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out = act(x[:, :K]) * x[:, K:]``, each factor rounded to the type of ``x``; rows of ``out`` are rounded too.

    Where none is rounded, several programs may share a row: each then has STEP of its GROUPS.
    ``act`` is silu, or with GELU the tanh approximation of gelu. Both are ``x * sigmoid(...)``.
    """
    let_next_start(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * (STEP * 128) + _columns(STEP)
    inside = column < K
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + K + column, mask=inside, other=0.0).to(tl.float32)
    slope = gate
    if GELU:
        # 2 sqrt(2 / pi), as tanh(z) = 2 sigmoid(2 z) - 1
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    gate = (gate / (1.0 + tl.exp(tl.minimum(-slope, 80.0)))).to(x.dtype.element_ty).to(tl.float32)
    product = (gate * up).to(x.dtype.element_ty)
    tl.store(out + row * K + column, product, mask=inside)
    if STEP >= GROUPS:
        _store_rounded(int8, values, scales, fp8, fp8_scales, product.to(tl.float32), K, GROUPS, STEP, FP8)


@triton.jit
def _mean(v, K, STEP: tl.constexpr):
    return tl.sum(tl.reshape(v, (STEP * 128,)), axis=0) / K


@triton.jit(do_not_specialize=["int8"])
def norm(
    x,
    x_stride,
    residual,
    residual_stride,
    weights,
    biases,
    which,
    epsilon,
    out,
    int8,
    values,
    scales,
    fp8,
    fp8_scales,
    K,
    RESIDUAL: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    FP8: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out`` is the norm of each row of ``x``, or with RESIDUAL of ``residual += x``; rows of ``out`` are rounded too.

    The RMS norm is multiplied by ``weights[which[row]]``, or with OFFSET by 1 + that. CENTER makes it the layer norm,
    with biases. Only Llama's RMS norm is rounded before it is multiplied, as in transformers.
    """
    let_next_start(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = _columns(STEP)
    inside = column < K
    kind = x.dtype.element_ty
    own = tl.load(which + row).to(tl.int64) * K + column
    w = tl.load(weights + own, mask=inside, other=0.0).to(tl.float32)
    wait(OVERLAP)
    v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        sums = residual + row * residual_stride + column
        total = (v + tl.load(sums, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(sums, total, mask=inside)
        v = total.to(tl.float32)
    if CENTER:
        v = tl.where(inside, v - _mean(v, K, STEP), 0.0)
    normed = v * tl.rsqrt(_mean(v * v, K, STEP) + epsilon)
    if CENTER:
        normed = normed * w + tl.load(biases + own, mask=inside, other=0.0).to(tl.float32)
    elif OFFSET:
        normed = normed * (1.0 + w)
    else:
        normed = normed.to(kind).to(tl.float32) * w
    normed = normed.to(kind)
    tl.store(out + row * K + column, normed, mask=inside)
    _store_rounded(int8, values, scales, fp8, fp8_scales, normed.to(tl.float32), K, GROUPS, STEP, FP8)
