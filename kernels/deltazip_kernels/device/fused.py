"""A product with base and delta added up in the tile, for segments so long that tensor cores are what limits it.

The sum is the left operand and stays in registers. A thread unpacks 16 neighbouring columns of every 64, which the
tensor cores take four at a time: so columns are multiplied in another order than they lie in memory (``_column``).
"""

import triton
import triton.language as tl

from deltazip_kernels.device.grouped import INT1, INT4, SPARSE2, row_scales, unit
from deltazip_kernels.device.locate import load_entry, part_of, pointer
from deltazip_kernels.device.merge import columns

# From a signed byte, a multiple of 16, to half of it in bfloat16: its upper half goes into the fraction of a float from
# 128 to 255, from which 192 is taken. Then times scale plus base, rounded once.
_SUM = tl.constexpr(
    """{
.reg .b32 r, a, b, k;
shr.b32 r, $2, 1;
lop3.b32 r, r, 0x78787878, 0x40404040, 0x6A;
mov.b32 k, 0x43434343;
prmt.b32 a, r, k, 0x4140;
prmt.b32 b, r, k, 0x4342;
mov.b32 k, 0xC340C340;
add.rn.bf16x2 a, a, k;
add.rn.bf16x2 b, b, k;
fma.rn.bf16x2 $0, a, $5, $3;
fma.rn.bf16x2 $1, b, $6, $4;
}"""
)


@triton.jit
def _sum(base, level, scale, PLAIN: tl.constexpr):
    """``base + level / 2 * scale`` in the type of ``base``, rounded once."""
    if PLAIN:
        return (base.to(tl.float32) + level.to(tl.float32) * 0.5 * scale.to(tl.float32)).to(base.dtype)
    return tl.inline_asm_elementwise(_SUM, "=&r,=&r,r,r,r,r,r", [level, base, scale], tl.bfloat16, True, 4)


@triton.jit
def _column(k):
    """The column at place ``16 i + 8 h + 2 t + j`` of 64 is ``16 t + 4 i + 2 h + j``."""
    column = (k & -64) + ((k >> 1) & 3) * 16 + ((k >> 4) & 3) * 4 + ((k >> 3) & 1) * 2 + (k & 1)
    return tl.max_contiguous(tl.multiple_of(column, 2), 2)


@triton.jit
def _reordered(w, BN: tl.constexpr):
    """Columns [BN, 128] in the order of :func:`_column`."""
    return tl.reshape(tl.permute(tl.reshape(w, (BN, 2, 4, 4, 2, 2)), (0, 1, 3, 4, 2, 5)), (BN, 128))


@triton.jit
def _walk(
    x,
    base,
    codes,
    scales,
    extra,
    n,
    words,
    last,
    K: tl.constexpr,
    CODEC: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """float32 [BN, BM]: one tile along K, from ``x`` [128, BM] and ``base`` [BN, 128] on."""
    GROUPS: tl.constexpr = K // 128
    LANES: tl.constexpr = 64 if CODEC == INT4 else 32
    SHARED: tl.constexpr = CODEC == INT1 or CODEC == SPARSE2
    tile = n >> 6
    row = n & 63
    lane = tl.arange(0, 32)
    c = codes + (tile * ((GROUPS // 2 if SHARED else GROUPS) * 64 * LANES) + row * LANES)[:, None] + lane[None, :]
    e = extra + (tile * (GROUPS * 1024) + row * 32)[:, None] + lane[None, :]
    s = scales + tl.minimum(words >> 5, last >> 6) * (GROUPS * 32) + (words & 31)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for i in tl.range(0, GROUPS, num_stages=STAGES):
        level = columns(c, e, CODEC, i & 1, PLAIN)
        scale = (row_scales(tl.load(s), BN) * (2.0 / unit(CODEC))).to(tl.bfloat16)
        w = _reordered(_sum(tl.load(base), level, tl.broadcast_to(scale[:, None], (BN, 128)), PLAIN), BN)
        v = tl.load(x)
        if PLAIN:
            w, v = w.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(w, v, acc)
        x += 128
        base += 128
        c += (i & 1) * 2048 if SHARED else 64 * LANES
        e += (i & 1) * 2048
        s += 32
    return acc


@triton.jit(do_not_specialize=["T", "slot"])
def fused(
    y,
    y_stride,
    x,
    x_stride,
    T,
    base,
    table,
    slot,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    K: tl.constexpr,
    CODECS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    NATURAL: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """``y`` [T, N] = x [T, K] @ (base [N, K] + the deltas of ``slot``).T, K a multiple of 256, all of one type.

    CODECS are those of the parts.
    """
    part, block, column, width = part_of(tl.program_id(1), ROWS, TILES)
    codec, codes, scales, extra = load_entry(table, slot, part, len(ROWS))
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    words = block * (BN // 2) + tl.arange(0, BN // 2)
    known = tl.minimum(n, width - 1)  # outputs beyond the last are computed like it and not stored
    k = tl.arange(0, 128)
    b = base + (column + known).to(tl.int64)[:, None] * K + k[None, :]
    x += tl.minimum(m, T - 1).to(tl.int64)[None, :] * x_stride + (_column(k) if NATURAL else k)[:, None]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for i in tl.static_range(0, len(CODECS)):
        if codec == CODECS[i]:
            acc = _walk(
                x, b, pointer(codes, tl.uint8), pointer(scales, tl.int32), pointer(extra, tl.uint8), known, words,
                width - 1, K, CODECS[i], BN, BM, STAGES, PLAIN,
            )  # fmt: skip
    y += m.to(tl.int64)[None, :] * y_stride + (column + n)[:, None]
    tl.store(y, acc.to(y.dtype.element_ty), mask=(m < T)[None, :] & (n < width)[:, None])


@triton.jit
def reorder(x, out, SIZE: tl.constexpr):
    """Columns in the order of :func:`_column`; both contiguous, rows multiples of 64."""
    at = tl.program_id(0).to(tl.int64) * SIZE
    k = tl.arange(0, SIZE)
    tl.store(out + at + k, tl.load(x + at + _column(k)))
