"""The kernel behind ``deltazip_kernels.merged``: the sum of a base weight and a packed delta."""

import triton
import triton.language as tl

from deltazip_kernels.device.grouped import INT1, INT2, INT3, INT4, SPARSE2, SPARSE4, unit
from deltazip_kernels.device.unpack import (
    unpack_int1,
    unpack_int2,
    unpack_int3,
    unpack_int4,
    unpack_sparse2,
    unpack_sparse4,
)


@triton.jit
def columns(c, e, CODEC: tl.constexpr, ODD: tl.constexpr, PLAIN: tl.constexpr):
    """One group's levels int8 [n, 128] in column order. ``c`` and ``e`` [n, 32] point to lanes of codes, and
    of the index or of low bits."""
    if CODEC == INT4:
        p0, p2 = unpack_int4(tl.load(c), PLAIN)
        p1, p3 = unpack_int4(tl.load(c + 32), PLAIN)
    elif CODEC == INT3:
        p0, p1, p2, p3 = unpack_int3(tl.load(c), tl.load(e), ODD, PLAIN)
    elif CODEC == INT2:
        p0, p1, p2, p3 = unpack_int2(tl.load(c), PLAIN)
    elif CODEC == INT1:
        p0, p1, p2, p3 = unpack_int1(tl.load(c), ODD, PLAIN)
    elif CODEC == SPARSE4:
        p0, p1, p2, p3 = unpack_sparse4(tl.load(c), tl.load(e), ODD, PLAIN)
    else:
        p0, p1, p2, p3 = unpack_sparse2(tl.load(c), tl.load(e), ODD, PLAIN)
    return tl.reshape(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (c.shape[0], 128))


@triton.jit
def scale_place(r):
    """Where the scale of row ``r`` of a tile lies: those of rows ``r`` and ``r + 8`` are neighbours."""
    return (r >> 4) * 16 + (r & 7) * 2 + ((r >> 3) & 1)


@triton.jit
def merge(
    out,
    base,
    base_scales,
    codes,
    scales,
    extra,
    N,
    K: tl.constexpr,
    CODEC: tl.constexpr,
    SCALED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """``out`` [N, K] = ``base`` + delta. A program has 64 rows and two groups of columns.

    With SCALED row ``n`` of the base is multiplied by ``base_scales[n]``.
    """
    GROUPS: tl.constexpr = (K + 127) // 128
    PAIRS: tl.constexpr = (GROUPS + 1) // 2
    LANES: tl.constexpr = 64 if CODEC == INT4 else 32
    SHARED: tl.constexpr = CODEC == INT1 or CODEC == SPARSE2
    UNIT: tl.constexpr = unit(CODEC)
    pair = tl.program_id(0)
    tile = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, 64)
    lane = r[:, None] * LANES + tl.arange(0, 32)[None, :]
    shared = ((tile * PAIRS + pair) * 64 + r[:, None]) * 32 + tl.arange(0, 32)[None, :]
    n = tile * 64 + r
    if SCALED:
        base_scale = tl.load(base_scales + n, mask=n < N, other=0.0)
    for odd in tl.static_range(0, 2):
        group = 2 * pair + odd
        if group < GROUPS:
            c = codes + (shared if SHARED else (tile * GROUPS + group) * (64 * LANES) + lane)
            levels = columns(c, extra + shared, CODEC, odd == 1, PLAIN).to(tl.float32)
            scale = tl.load(scales + (tile * GROUPS + group) * 64 + scale_place(r)).to(tl.float32) * (1.0 / UNIT)
            k = group * 128 + tl.arange(0, 128)
            at = n[:, None] * K + k[None, :]
            inside = (n < N)[:, None] & (k < K)[None, :]
            w = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
            if SCALED:
                w = w * base_scale[:, None]
            w += levels * scale[:, None]
            tl.store(out + at, w.to(out.dtype.element_ty), mask=inside)
