"""The kernel behind ``deltazip_kernels.rope``.

A program has BLOCK heads of one row of q|k|v. A head has three pieces: two halves of HALF columns, padded to WIDTH,
which rotate into each other, and REST columns behind them, padded to TAIL, which stay. ``positions``, the tables and
``where`` are read before the program waits, so the launch ahead must not write these.
"""

import triton
import triton.language as tl

from deltazip_kernels.device.locate import let_next_start, wait


@triton.jit
def _normed(
    v, root, q_weights, k_weights, row, column, h, inside, H: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Heads of q and k times ``root`` times their weights, rounded to KIND after each factor as in transformers."""
    q = tl.load(q_weights + row + column, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_weights + row + column, mask=inside, other=0.0).to(tl.float32)
    weights = tl.where((h < H)[:, None], q[None, :], k[None, :])
    normed = ((v * root[:, None]).to(KIND).to(tl.float32) * weights).to(KIND).to(tl.float32)
    return tl.where((h < H + G)[:, None], normed, v)


@triton.jit
def _store_heads(
    q, k, v, column, h, inside, values, inverse, to, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Store heads of q to ``q``; those of k and v times ``inverse`` [heads] to ``k`` and ``v``, unless ``to`` is -1."""
    at = h[:, None] * D + column[None, :]
    tl.store(q + at, values.to(q.dtype.element_ty), mask=inside & (h < H)[:, None])
    values *= inverse[:, None]
    h = tl.where(to >= 0, h, 0)
    tl.store(k + (at - H * D), values.to(k.dtype.element_ty), mask=inside & ((h >= H) & (h < H + G))[:, None])
    tl.store(v + (at - (H + G) * D), values.to(v.dtype.element_ty), mask=inside & (h >= H + G)[:, None])


@triton.jit
def _store_scales(scales, scale_stride, h, top, to, H: tl.constexpr, G: tl.constexpr,
                  PAGE: tl.constexpr):  # fmt: skip
    """Store scales of heads of k and v for position ``to``, from largest magnitudes ``top``; returns their inverses."""
    top = tl.maximum(top, 1e-30)
    block = scales + to // PAGE * scale_stride + to % PAGE
    h = tl.where(to >= 0, h, 0)
    tl.store(block + (h - H) * PAGE, top / 448.0, mask=(h >= H) & (h < H + 2 * G))
    return 448.0 / top


@triton.jit
def rope(
    qkv, qkv_stride, positions, cos, sin, where, q, k_cache, k_stride, v_cache, v_stride,
    scales, scale_stride, q_weights, k_weights, which, epsilon,
    PAGE: tl.constexpr, SCALED: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Norm and rotate the first H + G heads of a row; write q to ``q``, k and v to position ``where`` of the caches.

    With SCALED, k and v are scaled to the range of e4m3, and ``scales`` are written.
    """
    let_next_start(OVERLAP)
    REST: tl.constexpr = D - 2 * HALF
    KIND: tl.constexpr = qkv.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    to = tl.load(where + row)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = (h < H + 2 * G)[:, None]
    turned = (h < H + G)[:, None]
    c = tl.arange(0, WIDTH)
    cosine = tl.load(cos + position * HALF + c, mask=c < HALF, other=0.0)[None, :]
    sine = tl.load(sin + position * HALF + c, mask=c < HALF, other=0.0)[None, :]
    wait(OVERLAP)
    inside = exists & (c < HALF)[None, :]
    at = qkv + row * qkv_stride + h[:, None] * D
    a = tl.load(at + c[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if REST:
        d = tl.arange(0, TAIL)
        behind = exists & (d < REST)[None, :]
        rest = tl.load(at + 2 * HALF + d[None, :], mask=behind, other=0.0).to(tl.float32)
    if NORM:
        version = tl.load(which + row).to(tl.int64) * D
        squares = tl.sum(a * a + b * b, axis=1)
        if REST:
            squares += tl.sum(rest * rest, axis=1)
        root = tl.rsqrt(squares / D + epsilon)
        a = _normed(a, root, q_weights, k_weights, version, c, h, c < HALF, H, G, KIND)
        b = _normed(b, root, q_weights, k_weights, version + HALF, c, h, c < HALF, H, G, KIND)
        if REST:
            rest = _normed(rest, root, q_weights, k_weights, version + 2 * HALF, d, h, d < REST, H, G, KIND)
    q += row * (H * D)
    token = to % PAGE * (G * D)
    k = k_cache + to // PAGE * k_stride + token
    v = v_cache + to // PAGE * v_stride + token
    left = tl.where(turned, a * cosine - b * sine, a)
    right = tl.where(turned, b * cosine + a * sine, b)
    inverse = tl.full((BLOCK,), 1.0, tl.float32)
    if SCALED:
        top = tl.max(tl.maximum(tl.abs(left), tl.abs(right)), axis=1)
        if REST:
            top = tl.maximum(top, tl.max(tl.abs(rest), axis=1))
        inverse = _store_scales(scales, scale_stride, h, top, to, H, G, PAGE)
    _store_heads(q, k, v, c, h, inside, left, inverse, to, H, G, D)
    _store_heads(q, k, v, HALF + c, h, inside, right, inverse, to, H, G, D)
    if REST:
        _store_heads(q, k, v, 2 * HALF + d, h, behind, rest, inverse, to, H, G, D)
