"""The grouped delta product over packed codes: one launch over all segments, slots and stacked linears.

A program computes BN outputs of one linear for BM rows of one segment. It walks along K, two groups (256 columns) a
step. Weights are the left operand of the tensor cores, so that a few rows of x fill a tile.
"""

import triton
import triton.language as tl

from deltazip_kernels.device.locate import (
    add_outputs,
    let_next_start,
    load_entry,
    load_item,
    load_outputs,
    part_of,
    pointer,
    wait,
)
from deltazip_kernels.device.unpack import (
    unpack_int1,
    unpack_int2,
    unpack_int3,
    unpack_int4,
    unpack_sparse2,
    unpack_sparse4,
)

# The ids of ``table.CODEC_IDS``; a test compares them.
INT4 = tl.constexpr(1)
INT3 = tl.constexpr(2)
INT2 = tl.constexpr(3)
INT1 = tl.constexpr(4)
SPARSE4 = tl.constexpr(5)
SPARSE2 = tl.constexpr(6)

MOST_SPLITS = tl.constexpr(4)
"""The maximum number of programs that share a tile along K."""


@triton.constexpr_function
def unit(codec):
    """What a code of one is as an unpacked int8: ``layout.Codec.unit``."""
    return {1: 16, 2: 32, 3: 64, 4: 128, 5: 16, 6: 64}[codec]


@triton.jit
def _weights(codes, extra, CODEC: tl.constexpr, ODD: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr):
    """One group's weights int8 [BN, 128] in position order."""
    if CODEC == INT4:
        low, high = unpack_int4(codes, PLAIN)
        w = tl.permute(tl.join(low, high), (0, 2, 1))
    else:
        if CODEC == INT3:
            p0, p1, p2, p3 = unpack_int3(codes, extra, ODD, PLAIN)
        elif CODEC == INT2:
            p0, p1, p2, p3 = unpack_int2(codes, PLAIN)
        elif CODEC == INT1:
            p0, p1, p2, p3 = unpack_int1(codes, ODD, PLAIN)
        elif CODEC == SPARSE4:
            p0, p1, p2, p3 = unpack_sparse4(codes, extra, ODD, PLAIN)
        else:
            p0, p1, p2, p3 = unpack_sparse2(codes, extra, ODD, PLAIN)
        w = tl.permute(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (0, 2, 3, 1))
    # Moves nothing: in the tensor cores' layout the planes are in registers of the same threads.
    return tl.reshape(w, (BN, 128))


@triton.jit
def row_scales(pairs, BN: tl.constexpr):
    """Scales float32 [BN] from words [BN / 2], each with those of rows r and r + 8 in bf16."""
    low = (pairs << 16).to(tl.float32, bitcast=True)
    high = (pairs & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.permute(tl.reshape(tl.join(low, high), (BN // 16, 8, 2)), (0, 2, 1)), (BN,))


@triton.jit
def _add_group(acc, w, x, pairs, BN: tl.constexpr):
    part = tl.dot(w, x, out_dtype=tl.int32)
    return acc + part.to(tl.float32) * row_scales(pairs, BN)[:, None]


@triton.jit
def _product(
    codes,
    extra,
    scales,
    x,
    live,
    n,
    tile,
    scale_word,
    scale_tile,
    CODEC: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The product of one tile, float32 [BN, BM], over all of K, or with SPLIT over this program's share of K."""
    LANES: tl.constexpr = 64 if CODEC == INT4 else 32
    SHARED: tl.constexpr = CODEC == INT1 or CODEC == SPARSE2  # codes of two groups in one byte
    EXTRA: tl.constexpr = CODEC == INT3 or CODEC == SPARSE4 or CODEC == SPARSE2
    UNIT: tl.constexpr = unit(CODEC)
    PAIRS: tl.constexpr = (GROUPS + 1) // 2
    STEPS: tl.constexpr = PAIRS if SHARED else GROUPS
    C_STEP: tl.constexpr = 64 * LANES if SHARED else 128 * LANES
    begin = 0
    end = GROUPS // 2
    if SPLIT:
        each = tl.cdiv(GROUPS // 2, tl.num_programs(2))  # steps of two groups
        begin = tl.minimum(tl.program_id(2) * each, GROUPS // 2)
        end = tl.minimum(begin + each, GROUPS // 2)
    row = n & 63
    lane = tl.arange(0, LANES)
    c = codes + begin * C_STEP + (tile * (STEPS * 64 * LANES) + row * LANES)[:, None] + lane[None, :]
    e = extra + begin * 2048 + (tile * (PAIRS * 2048) + row * 32)[:, None] + tl.arange(0, 32)[None, :]
    s = scales + begin * 64 + scale_tile * (GROUPS * 32) + scale_word
    x += begin * 256 + tl.arange(0, 128)[:, None]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for _ in tl.range(begin, end, num_stages=STAGES):
        even = tl.load(c)
        odd = even if SHARED else tl.load(c + 64 * LANES)
        both = tl.load(e) if EXTRA else even
        x0 = tl.load(x, mask=live[None, :], other=0)
        x1 = tl.load(x + 128, mask=live[None, :], other=0)
        acc = _add_group(acc, _weights(even, both, CODEC, False, BN, PLAIN), x0, tl.load(s), BN)
        acc = _add_group(acc, _weights(odd, both, CODEC, True, BN, PLAIN), x1, tl.load(s + 32), BN)
        c += C_STEP
        e += 2048
        s += 64
        x += 256
    if GROUPS % 2 and (not SPLIT or tl.program_id(2) == tl.num_programs(2) - 1):
        even = tl.load(c)
        both = tl.load(e) if EXTRA else even
        x0 = tl.load(x, mask=live[None, :], other=0)
        acc = _add_group(acc, _weights(even, both, CODEC, False, BN, PLAIN), x0, tl.load(s), BN)
    return acc * (1.0 / UNIT)


@triton.jit
def _sum_splits(acc, partials, arrived, BN: tl.constexpr, BM: tl.constexpr, WIDEST: tl.constexpr):
    """Add up ``acc`` of all programs of a tile, in the order of their shares of K. Returns the sum, and whether this
    program was the last to finish: for the others the sum is incomplete.

    Each tile has room for WIDEST rows in ``partials``, so that tiles of different numbers of rows do not overlap."""
    splits = tl.num_programs(2)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    at = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    mine = partials + program * splits * (BN * WIDEST) + at
    tl.store(mine + tl.program_id(2) * (BN * BM), acc)
    tl.debug_barrier()
    last = tl.atomic_add(arrived + program, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        for i in tl.static_range(0, MOST_SPLITS):  # unrolled: the loads go out together
            there = tl.full((BN, BM), i, tl.int32) < splits
            acc += tl.load(mine + i * (BN * BM), mask=there, other=0.0, cache_modifier=".cg")
        tl.store(arrived + program, 0)
    return acc, last


@triton.jit
def _add_rows(
    y,
    y_stride,
    values,
    x_scales,
    partials,
    arrived,
    first,
    end,
    column,
    width,
    block,
    codec,
    codes,
    scales,
    extra,
    GROUPS: tl.constexpr,
    CODECS: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    WIDEST: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Add block ``block`` of a linear's outputs for rows ``first:end``, at most BM, to ``y``."""
    n = block * BN + tl.arange(0, BN)
    words = block * (BN // 2) + tl.arange(0, BN // 2)
    last_tile = (width - 1) >> 6  # a block of several tiles may reach beyond the last one
    tile = tl.minimum(n >> 6, last_tile)
    scale_tile = tl.minimum(words >> 5, last_tile)
    m = first + tl.arange(0, BM)
    live = m < end
    x = values + m.to(tl.int64)[None, :] * (GROUPS * 128)
    x_scale = tl.load(x_scales + m, mask=live, other=0.0)
    EARLY: tl.constexpr = BM <= 16 and not SPLIT  # with more rows ``before`` would hold too many registers meanwhile
    if EARLY:
        before = load_outputs(y, y_stride, m, column + n, live, n < width)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for i in tl.static_range(0, len(CODECS)):
        if codec == CODECS[i]:
            acc = _product(
                pointer(codes, tl.uint8), pointer(extra, tl.uint8), pointer(scales, tl.int32), x, live,
                n, tile, words & 31, scale_tile, CODECS[i], GROUPS, SPLIT, BN, BM, STAGES, PLAIN,
            )  # fmt: skip
    complete = True
    if SPLIT:
        acc, complete = _sum_splits(acc, partials, arrived, BN, BM, WIDEST)
    if complete:
        if not EARLY:
            before = load_outputs(y, y_stride, m, column + n, live, n < width)
        add_outputs(y, y_stride, m, column + n, live, n < width, before, acc * x_scale[None, :])


@triton.jit(do_not_specialize=["tiles", "parts"])
def grouped(
    y,
    y_stride,
    values,
    x_scales,
    items,
    table,
    partials,
    arrived,
    widths,
    tiles,
    parts,
    GROUPS: tl.constexpr,
    CODECS: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BATCHES: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Add the products of rounded rows with packed deltas to ``y``. CODECS are the ids that may occur.

    An item is computed with the least of BATCHES, which ascend, that holds its rows. With SPLIT, several programs share
    a tile; the last one to finish adds up their ``partials``. The counters ``arrived`` are zero before and after.
    """
    slot, first, end = load_item(items)
    part, block, column, width = part_of(tl.program_id(0), widths, tiles)
    codec, codes, scales, extra = load_entry(table, slot, part, parts)
    served = False
    for i in tl.static_range(0, len(CODECS)):
        served = served | (codec == CODECS[i])
    rows = tl.where(served & (slot >= 0), end - first, 0)
    wait(OVERLAP)
    let_next_start(OVERLAP)
    for i in tl.static_range(0, len(BATCHES)):
        if rows <= BATCHES[i] and rows > (BATCHES[i - 1] if i > 0 else 0):
            _add_rows(
                y, y_stride, values, x_scales, partials, arrived, first, end, column, width, block,
                codec, codes, scales, extra, GROUPS, CODECS, SPLIT, BN, BATCHES[i], BATCHES[-1], STAGES, PLAIN,
            )  # fmt: skip
