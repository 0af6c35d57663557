"""The kernel behind ``deltazip_kernels.fused``: a GEMM whose left operand, base plus delta, is made in registers.

One warp copies tiles of the base and of the activations to shared memory, eight warps add the delta to the base's and
multiply. The tensor cores work on one step of 64 columns while the next one's weights are added up.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from deltazip_kernels.device.grouped import INT4

# Triton 3.9 has other names for these than 3.6.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

BN = gl.constexpr(128)
"""Outputs of a tile: two row tiles of the packed layout."""
BK = gl.constexpr(64)
"""Columns of a step, half a group."""
BY = gl.constexpr(128)
"""Rows of a tile that are stored at once."""

# Where a thread holds the left operand [outputs, 16 columns of one instruction each, those columns] ...
OPERAND = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 1, 0], [0, 2, 0]],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0], [64, 0, 0]],
        block_bases=[],
        shape=[128, 4, 16],
    )
)
# ... and the words of codes [outputs, words] that it needs for that, in the order that makes for 16-byte loads.
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, 4],
    )
)
FLAT = gl.constexpr(gl.BlockedLayout([4], [32], [8], [0]))


def _add_int2() -> str:
    """From $4..$7, pairs of the base's weights, to $0..$3, with the delta added: columns c, c + 1 of rows r and r + 8,
    then c + 8, c + 9. Words of codes in $8 and $10, pairs of scales in $16 and $18, $24 rotates c's code to bit 1.

    A code and half a step below it become the mantissa of 128 + x, the right one of a pair four times as large.
    """
    text = "{\n.reg .b32 v, p, bias;\nmov.b32 bias, 0xC310C304;\n"  # -144, -132
    for row in range(2):
        text += f"shf.r.wrap.b32 v, ${8 + 2 * row}, ${8 + 2 * row}, $24;\n"
        for half in range(2):
            pair = row + 2 * half
            text += f"prmt.b32 p, v, 0, {'0x3232' if half else '0x1010'};\n"
            text += "lop3.b32 p, p, 0x00180006, 0x43144305, 0x6A;\n"  # (p & mask) ^ bits
            text += "add.rn.bf16x2 p, p, bias;\n"
            text += f"fma.rn.bf16x2 ${pair}, p, ${16 + 2 * row}, ${4 + pair};\n"
    return text + "}"


def _add_int4() -> str:
    """Likewise; columns c in words of $8 and $10, c + 1 in $16 and $18, scales in $24 and $26, $32 shifts to bit 0."""
    text = "{\n.reg .b32 a, b, p, bias;\nmov.b32 bias, 0xC308C308;\n"  # -136 twice
    for row in range(2):
        text += f"shr.b32 a, ${8 + 2 * row}, $32;\nshr.b32 b, ${16 + 2 * row}, $32;\n"
        for half in range(2):
            pair = row + 2 * half
            text += f"prmt.b32 p, a, b, {'0x7632' if half else '0x5410'};\n"
            text += "lop3.b32 p, p, 0x000F000F, 0x43084308, 0x6A;\n"
            text += "add.rn.bf16x2 p, p, bias;\n"
            text += f"fma.rn.bf16x2 ${pair}, p, ${24 + 2 * row}, ${4 + pair};\n"
    return text + "}"


ADD_INT2 = gl.constexpr(_add_int2())
ADD_INT4 = gl.constexpr(_add_int4())
INT2_OPERANDS = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 28))
INT4_OPERANDS = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 36))
PREFETCH = gl.constexpr("prefetch.global.L2 [$1];\nmov.b32 $0, 0;")
TWICE = gl.constexpr("prmt.b32 $0, $1, 0, 0x1010;")
# Times a half and an eighth: what an int2 code's bits are worth in the left and the right of a pair.
HALVED = gl.constexpr(
    "{\n.reg .b32 k;\nmov.b32 k, 0x3E003F00;\nprmt.b32 $0, $1, 0, 0x1010;\nmul.rn.bf16x2 $0, $0, k;\n}"
)


@gluon.jit
def find_tile(tile, TILES, codes, scales, second, third):
    """A tile's first output, its number within its linear, and that linear's codes and scales.

    Tiles ``second`` and ``third`` are the first ones of the second and third of stacked linears.
    """
    block = tile % TILES
    n = block * BN
    at, scale = codes[0], scales[0]
    if block >= third:
        at, scale, block = codes[2], scales[2], block - third
    elif block >= second:
        at, scale, block = codes[1], scales[1], block - second
    return n, block, at, scale


@gluon.jit
def point(block, group, codes, scales, K, LANES: gl.constexpr):
    """Pointers [128, 4] to the first words and [128] to the scales of a tile's rows in ``group``."""
    r = gl.arange(0, BN, gl.SliceLayout(1, WORDS))
    word = gl.arange(0, 4, gl.SliceLayout(0, WORDS))
    inside = r & 63
    first = (block * 2 + (r >> 6)).to(gl.int64) * (K // 2) + group * 64  # 64 rows of K / 128 groups in a row tile
    words = codes + (first * (LANES // 4) + inside * (LANES // 4))[:, None] + word[None, :]
    return words, scales + first + ((inside >> 4) * 16 + (inside & 7) * 2 + ((inside >> 3) & 1))


@gluon.jit
def load_words(words, CODEC: gl.constexpr):
    """A step's words of codes; for int4 those of its even pairs' left columns and of the right ones."""
    left = gl.load(words)
    right = left
    if CODEC == INT4:
        right = gl.load(words + 8)
    return left, right


@gluon.jit
def pair_of_scales(scale, CODEC: gl.constexpr):
    """int32 [128]: what both halves of a pair of codes are multiplied with."""
    bits = scale.to(gl.int16, bitcast=True).to(gl.int32)
    CODE: gl.constexpr = TWICE if CODEC == INT4 else HALVED
    return gl.inline_asm_elementwise(CODE, "=r,r", [bits], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def merge(base, words, more, scale, LAYOUT: gl.constexpr, CODEC: gl.constexpr):
    """The left operand of one step [128, 64]: ``base`` in shared memory plus the delta, rounded once."""
    BY_WORD: gl.constexpr = gl.SliceLayout(2, OPERAND)
    weight = gl.convert_layout(gl.reshape(base.load(LAYOUT), [BN, 4, 16]), OPERAND, assert_trivial=True)
    words = gl.convert_layout(words, BY_WORD)[:, :, None]
    scale = gl.convert_layout(scale, gl.SliceLayout(1, BY_WORD))[:, None, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, OPERAND)))
    shift = ((column // 2) % 4 * 4)[None, None, :]
    if CODEC == INT4:
        more = gl.convert_layout(more, BY_WORD)[:, :, None]
        weight = gl.inline_asm_elementwise(
            ADD_INT4, INT4_OPERANDS, [weight, words, more, scale, shift], dtype=gl.bfloat16, is_pure=True, pack=8
        )
    else:
        shift = (shift + 31) % 32
        weight = gl.inline_asm_elementwise(
            ADD_INT2, INT2_OPERANDS, [weight, words, scale, shift], dtype=gl.bfloat16, is_pure=True, pack=8
        )
    return gl.convert_layout(gl.reshape(weight, [BN, BK]), LAYOUT, assert_trivial=True)


@gluon.jit
def flatten(acc, BM: gl.constexpr):
    """A tile's sums [128, BM] in the order in which a thread stores 16 bytes at once."""
    parts = gl.permute(gl.reshape(acc, [8, 2, 8, BM // 8, 4, 2]), (3, 0, 2, 4, 1, 5))
    return gl.convert_layout(gl.reshape(parts, [BN * BM]), FLAT, assert_trivial=True)


@gluon.jit
def unflatten(values, LAYOUT: gl.constexpr, BM: gl.constexpr):
    """The inverse of :func:`flatten`."""
    parts = gl.permute(gl.reshape(values, [BM // 8, 8, 8, 4, 2, 2]), (1, 4, 2, 0, 3, 5))
    return gl.convert_layout(gl.reshape(parts, [BN, BM]), LAYOUT, assert_trivial=True)


@gluon.jit
def prefetch(codes, scales, block, group, K, LANES: gl.constexpr):
    """Ask for a group's codes and scales: until the multiplying warps load them they are in the L2."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    first = (block * 2 + lane // 16).to(gl.int64) * (K // 2) + group * 64
    at = codes + first * (LANES // 4) + lane % 16 * LANES
    gl.inline_asm_elementwise(PREFETCH, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)
    if LANES == 64:
        gl.inline_asm_elementwise(PREFETCH, "=r,l", [at + 32], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(PREFETCH, "=r,l", [scales + first], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_tiles(x, base, delta, rings, share, CODEC: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr):
    """The copying warp: all steps of groups ``begin:end``, as far ahead as there is room."""
    codes, scales, second, third = delta
    base_tiles, x_tiles, full, empty = rings
    begin, end, _, M, K, TILES = share
    LANES: gl.constexpr = 64 if CODEC == INT4 else 32
    groups = K // 128
    step = 0
    for at in range(begin, end):
        tile = at // groups
        group = at - tile * groups
        n, block, tile_codes, tile_scales = find_tile(tile, TILES, codes, scales, second, third)
        m = tile // TILES * BM
        both = m + BM - BY < M
        for half in gl.static_range(2):
            k = group * 128 + half * BK
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), (step // STAGES + 1) % 2)
            mbarrier.expect(full.index(slot), (BN + BM) * BK * 2, pred=both)
            mbarrier.expect(full.index(slot), (BN + BY) * BK * 2, pred=not both)
            copy_in(base, [n, k], full.index(slot), base_tiles.index(slot))
            copy_in(x, [m, k], full.index(slot), x_tiles.index(slot).slice(0, BY, dim=0))
            if BM > BY:  # copying rows that do not exist takes longer than copying rows
                copy_in(x, [m + BY, k], full.index(slot), x_tiles.index(slot).slice(BY, BM - BY, dim=0), pred=both)
            step += 1
        prefetch(tile_codes, tile_scales, block, group, K, LANES)


@gluon.jit
def collect(acc, partials, arrived, last, LAYOUT: gl.constexpr, BM: gl.constexpr):
    """``acc`` and what the programs after this one, up to ``last``, have of the same tile, in their order."""
    inside = gl.arange(0, BN * BM, FLAT)
    for other in range(gl.program_id(0) + 1, last + 1):
        while gl.atomic_add(arrived + other, 0, sem="acquire") == 0:
            pass
        barrier()
        part = gl.load(partials + other * (BN * BM) + inside, cache_modifier=".cg")
        acc += unflatten(part, LAYOUT, BM)
        barrier()
        gl.atomic_xchg(arrived + other, 0, sem="relaxed")
    return acc


@gluon.jit
def store_rows(y, room, m, n, acc):
    """128 rows of a tile, as soon as ``room`` in shared memory is free of those before."""
    tma.store_wait(0)
    room.permute((1, 0)).store(acc.to(gl.bfloat16))
    fence_async_shared()
    copy_out(y, [m, n], room)


@gluon.jit
def store_tile(y, room, m, n, M, acc, BM: gl.constexpr):
    """The tile's rows of ``y`` from row ``m``, column ``n`` on; rows beyond the last, ``M - 1``, do not exist."""
    if BM == BY:
        store_rows(y, room, m, n, acc)
    else:
        first, second = gl.split(gl.permute(gl.reshape(acc, [BN, 2, BY]), (0, 2, 1)))
        store_rows(y, room, m, n, first)
        if m + BY < M:
            store_rows(y, room, m + BY, n, second)


@gluon.jit
def multiply(
    y, delta, rings, room, partials, arrived, share, CODEC: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr
):
    """The multiplying warps: groups ``begin:end`` of all tiles' ``total``."""
    codes, scales, second, third = delta
    base_tiles, x_tiles, full, empty = rings
    begin, end, total, M, K, TILES = share
    LANES: gl.constexpr = 64 if CODEC == INT4 else 32
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BM, 16])
    OPERAND_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    groups = K // 128
    step = 0
    at = begin
    while at < end:
        tile = at // groups
        first = at - tile * groups
        stop = gl.minimum(groups, first + end - at)
        n, block, tile_codes, tile_scales = find_tile(tile, TILES, codes, scales, second, third)
        words, scale_at = point(block, first, tile_codes, tile_scales, K, LANES)
        acc = gl.zeros([BN, BM], gl.float32, ACC)
        left, right = load_words(words, CODEC)
        scale = gl.load(scale_at)
        for group in range(first, stop):
            pair = pair_of_scales(scale, CODEC)
            for half in gl.static_range(2):
                now_left, now_right = left, right
                if half == 0:
                    left, right = load_words(words + 4, CODEC)
                elif group + 1 < stop:
                    words += 64 * LANES // 4
                    scale_at += 64
                    left, right = load_words(words, CODEC)
                    scale = gl.load(scale_at)
                slot = step % STAGES
                mbarrier.wait(full.index(slot), step // STAGES % 2)
                operand = merge(base_tiles.index(slot), now_left, now_right, pair, OPERAND_LAYOUT, CODEC)
                acc = warpgroup_mma(operand, x_tiles.index(slot).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])  # the step before this one is done with its tiles
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=step > 0)
                step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        if first > 0:
            gl.store(partials + gl.program_id(0) * (BN * BM) + gl.arange(0, BN * BM, FLAT), flatten(acc, BM))
            barrier()  # all threads have stored before one of them says so
            gl.atomic_xchg(arrived + gl.program_id(0), 1, sem="release")
        else:
            if stop < groups:
                last = ((tile + 1) * groups * gl.num_programs(0) - 1) // total
                acc = collect(acc, partials, arrived, last, ACC, BM)
            store_tile(y, room, tile // TILES * BM, n, M, acc, BM)
        at += stop - first
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["second", "third", "total", "M", "TILES"])
def fused(
    y,
    x,
    base,
    codes,
    scales,
    second,
    third,
    partials,
    arrived,
    total,
    M,
    K,
    TILES,
    CODEC: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``y`` [M, N] = ``x`` [M, K] (``base`` [N, K] + delta) transposed; descriptors of y, x and base, all bfloat16.

    A tile has 128 outputs and BM rows; TILES of them lie beside each other along N. All tiles' groups of 128 columns,
    ``total``, are dealt out evenly, to each program the next ones: of a tile that several share, the one with its first
    group adds up what the others leave in ``partials`` [programs, 128 * BM], and announce in ``arrived`` [programs]
    (zero between launches). Each does that before all else, so who waits for it waits for no one who waits.
    """
    base_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, BK], base.layout)
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], x.layout)
    room = gl.allocate_shared_memory(gl.bfloat16, [BY, BN], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    begin = gl.program_id(0) * total // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * total // gl.num_programs(0)
    delta = (codes, scales, second, third)
    rings = (base_tiles, x_tiles, full, empty)
    share = (begin, end, total, M, K, TILES)
    gl.warp_specialize(
        [
            (multiply, (y, delta, rings, room, partials, arrived, share, CODEC, BM, STAGES)),
            (load_tiles, (x, base, delta, rings, share, CODEC, BM, STAGES)),
        ],
        [1],
        [24],
    )
