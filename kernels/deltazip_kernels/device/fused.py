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

from deltazip_kernels.device.fused_operand import BK, BN, load_words, merge, pair_of_scales, point
from deltazip_kernels.device.fused_share import find_piece, kinds_of, last_sharer, place, share_of
from deltazip_kernels.device.grouped import INT4

# Triton 3.9 has other names for these than 3.6.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

TALL = gl.constexpr(256)
"""Rows of a tile ..."""
LOW = gl.constexpr(128)
"""... and of the last one of a segment with so few rows left; rows that are copied or stored at once."""

FLAT = gl.constexpr(gl.BlockedLayout([4], [32], [8], [0]))
BY_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))
PREFETCH = gl.constexpr("prefetch.global.L2 [$1];\nmov.b32 $0, 0;")
PREFETCH_NEAR = gl.constexpr("prefetch.global.L1 [$1];\nmov.b32 $0, 0;")
# As in ``locate.py``, whose functions Gluon does not take.
LET_NEXT_START = gl.constexpr("griddepcontrol.launch_dependents;\nmov.b32 $0, 0;")
WAIT = gl.constexpr("griddepcontrol.wait;\nmov.b32 $0, 0;")


@gluon.jit
def find_tile(tile, tiles, linear):
    """A tile's first output, its block within its part, its first row, and the end of its segment's rows; then codec,
    codes and scales of its slot's delta for that part.

    ``tiles``: slot, first row and end of the segment of each row tile, [height, 4] int32, and their number. ``linear``:
    the table of deltas [slots, parts, 4], the number of parts, the number of blocks of outputs of all parts, and the
    first blocks of the second and third part.
    """
    rows, height = tiles
    table, parts, width, second, third = linear
    row, block = place(tile, height, width)
    slot = gl.load(rows + row * 4)
    m = gl.load(rows + row * 4 + 1)
    end = gl.load(rows + row * 4 + 2)
    n = block * BN
    entry = table + slot * parts * 4
    if block >= third:
        entry += 8
        block -= third
    elif block >= second:
        entry += 4
        block -= second
    codes = gl.multiple_of(gl.load(entry + 1).to(gl.pointer_type(gl.int32)), 16)
    scales = gl.multiple_of(gl.load(entry + 2).to(gl.pointer_type(gl.bfloat16)), 16)
    return n, block, m, end, gl.load(entry), codes, scales


@gluon.jit
def prefetch(codes, scales, block, group, K, LANES: gl.constexpr):
    """Prefetch a group's codes and scales to the L2, from where the multiplying warps load them later."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    first = (block * 2 + lane // 16).to(gl.int64) * (K // 2) + group * 64
    at = codes + first * (LANES // 4) + lane % 16 * LANES
    gl.inline_asm_elementwise(PREFETCH, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)
    if LANES == 64:
        gl.inline_asm_elementwise(PREFETCH, "=r,l", [at + 32], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(PREFETCH, "=r,l", [scales + first], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy_tiles(x, base, linear, rings, kind, K, step, CODEC: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr):
    """Copy what this program's tiles of one kind need, as far ahead as rings have room. Returns all steps so far."""
    base_tiles, x_tiles, full, empty = rings
    tiles, dealt = kind
    LANES: gl.constexpr = 64 if CODEC == INT4 else 32
    groups = K // 128
    program = gl.program_id(0)
    at, middle, end = share_of(program, dealt, groups)
    while at < end:
        tile, first, stop = find_piece(at, middle, program, dealt, groups)
        at += stop - first
        n, block, m, _, codec, codes, scales = find_tile(tile, tiles, linear)
        if codec == CODEC:
            for group in range(first, stop):
                for half in gl.static_range(2):
                    k = group * 128 + half * BK
                    slot = step % STAGES
                    mbarrier.wait(empty.index(slot), (step // STAGES + 1) % 2)
                    mbarrier.expect(full.index(slot), (BN + BM) * BK * 2)
                    copy_in(base, [n, k], full.index(slot), base_tiles.index(slot))
                    for y in gl.static_range(0, BM, LOW):
                        copy_in(x, [m + y, k], full.index(slot), x_tiles.index(slot).slice(y, LOW, dim=0))
                    step += 1
                prefetch(codes, scales, block, group, K, LANES)
    return step


@gluon.jit
def prefetch_near(codes, block, group, K, LANES: gl.constexpr):
    """Bring a group's codes from the L2 to the L1: the loads of either half take half of each 32 bytes."""
    r = gl.arange(0, BN, gl.BlockedLayout([1], [32], [8], [0]))
    first = (block * 2 + (r >> 6)).to(gl.int64) * (K // 2) + group * 64
    at = codes + (first + (r & 63)) * (LANES // 4)
    gl.inline_asm_elementwise(PREFETCH_NEAR, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)
    if LANES == 64:
        gl.inline_asm_elementwise(PREFETCH_NEAR, "=r,l", [at + 8], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def flatten(acc, BM: gl.constexpr):
    """A tile's sums [128, BM] in one dimension, in an order in which a thread stores 16 bytes at once."""
    parts = gl.permute(gl.reshape(acc, [8, 2, 8, BM // 8, 4, 2]), (3, 0, 2, 4, 1, 5))
    return gl.convert_layout(gl.reshape(parts, [BN * BM]), FLAT, assert_trivial=True)


@gluon.jit
def unflatten(values, LAYOUT: gl.constexpr, BM: gl.constexpr):
    """The inverse of :func:`flatten`."""
    parts = gl.permute(gl.reshape(values, [BM // 8, 8, 8, 4, 2, 2]), (1, 4, 2, 0, 3, 5))
    return gl.convert_layout(gl.reshape(parts, [BN, BM]), LAYOUT, assert_trivial=True)


@gluon.jit
def leave(acc, sums, BM: gl.constexpr):
    """Store ``acc`` for the program that has the tile's first columns, and tell it so."""
    partials, arrived = sums
    gl.store(partials + gl.program_id(0) * (BN * BM) + gl.arange(0, BN * BM, FLAT), flatten(acc, BM))
    barrier()  # all threads must have stored before one of them sets the flag
    gl.atomic_xchg(arrived + gl.program_id(0), 1, sem="release")


@gluon.jit
def collect(acc, sums, last, LAYOUT: gl.constexpr, BM: gl.constexpr):
    """Add the parts of the programs after this one, up to ``last``, to ``acc``, in their order; waits for each."""
    partials, arrived = sums
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
def store_rows(y, m, n, end, N, acc):
    """Store 128 rows of a tile, those before row ``end``, once the rows before them have left shared memory."""
    copies, out, room = y
    tma.store_wait(0)
    room.permute((1, 0)).store(acc.to(gl.bfloat16))
    if m + LOW <= end:
        fence_async_shared()
        copy_out(copies, [m, n], room)
    else:  # rows from ``end`` on belong to another segment
        row = m + gl.arange(0, LOW, gl.SliceLayout(1, BY_ROWS))
        column = n + gl.arange(0, BN, gl.SliceLayout(0, BY_ROWS))
        at = out + row.to(gl.int64)[:, None] * N + column[None, :]
        gl.store(at, room.load(BY_ROWS), mask=(row < end)[:, None])


@gluon.jit
def store_tile(y, m, n, end, N, acc, BM: gl.constexpr):
    """Store a tile to ``y``, from row ``m`` and column ``n`` on, without rows from ``end`` on."""
    if BM == LOW:
        store_rows(y, m, n, end, N, acc)
    else:
        first, second = gl.split(gl.permute(gl.reshape(acc, [BN, 2, LOW]), (0, 2, 1)))
        store_rows(y, m, n, end, N, first)
        store_rows(y, m + LOW, n, end, N, second)


@gluon.jit
def multiply_tiles(y, linear, rings, sums, kind, K, step, CODEC: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr):
    """Multiply this program's share of one kind of tiles. Returns all steps so far."""
    base_tiles, x_tiles, full, empty = rings
    tiles, dealt = kind
    LANES: gl.constexpr = 64 if CODEC == INT4 else 32
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BM, 16])
    OPERAND_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    groups = K // 128
    program = gl.program_id(0)
    at, middle, end = share_of(program, dealt, groups)
    while at < end:
        tile, first, stop = find_piece(at, middle, program, dealt, groups)
        at += stop - first
        n, block, m, rows_end, codec, codes, scales = find_tile(tile, tiles, linear)
        if codec == CODEC:
            words, scale_at = point(block, first, codes, scales, K, LANES)
            acc = gl.zeros([BN, BM], gl.float32, ACC)
            left, right = load_words(words, CODEC)
            scale = gl.load(scale_at)
            for group in range(first, stop):
                pair = pair_of_scales(scale, CODEC)
                after = gl.minimum(group + 1, stop - 1)  # the last group once more: a branch would be slower
                prefetch_near(codes, block, after, K, LANES)
                for half in gl.static_range(2):
                    slot = step % STAGES
                    mbarrier.wait(full.index(slot), step // STAGES % 2)
                    operand = merge(base_tiles.index(slot), left, right, pair, OPERAND_LAYOUT, CODEC)
                    x = x_tiles.index(slot).slice(0, BM, dim=0).permute((1, 0))
                    acc = warpgroup_mma(operand, x, acc, is_async=True)
                    # Not before the codes ahead are used: whoever needs one load waits for all that are under way.
                    if half == 0:
                        left, right = load_words(words + 4, CODEC)
                    else:
                        words += (after - group) * (64 * LANES // 4)
                        scale_at += (after - group) * 64
                        left, right = load_words(words, CODEC)
                        scale = gl.load(scale_at)
                    acc = warpgroup_mma_wait(1, deps=[acc])  # the step before this one is done with its tiles
                    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=step > 0)
                    step += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            if first > 0:
                leave(acc, sums, BM)
            else:
                if stop < groups:
                    acc = collect(acc, sums, last_sharer(tile, dealt, groups), ACC, BM)
                store_tile(y, m, n, rows_end, linear[2] * BN, acc, BM)
    return step


@gluon.jit
def copy(x, base, linear, rings, tall, low, K, CODEC: gl.constexpr, STAGES: gl.constexpr):
    """The copying warp. It waits for the launch ahead; before that no tile is full, so nothing is multiplied."""
    gl.inline_asm_elementwise(WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    step = copy_tiles(x, base, linear, rings, tall, K, gl.to_tensor(0), CODEC, TALL, STAGES)
    copy_tiles(x, base, linear, rings, low, K, step, CODEC, LOW, STAGES)


@gluon.jit
def multiply(y, linear, rings, sums, tall, low, K, CODEC: gl.constexpr, STAGES: gl.constexpr):
    """The multiplying warps."""
    partials, arrived = sums
    step = multiply_tiles(y, linear, rings, sums, tall, K, gl.to_tensor(0), CODEC, TALL, STAGES)
    programs = gl.num_programs(0)
    sums_of_low = (partials + programs * (BN * TALL), arrived + programs)
    multiply_tiles(y, linear, rings, sums_of_low, low, K, step, CODEC, LOW, STAGES)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["parts", "width", "second", "third", "tall", "low", "programs", "tall_shared", "low_shared"]
)
def fused(
    y,
    out,
    x,
    base,
    rows,
    table,
    parts,
    width,
    second,
    third,
    tall,
    low,
    programs,
    tall_shared,
    low_shared,
    partials,
    arrived,
    K,
    CODEC: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``out`` [T, N] = ``x`` [T, K] times (``base`` [N, K] + delta) transposed, for the row tiles of ``rows``.

    All are bfloat16; ``x`` and ``base`` are descriptors, ``y`` is that of ``out``. Tiles have 128 outputs; the first
    ``tall`` row tiles have 256 rows, the other ``low`` ones 128. Tiles whose delta is in another codec are skipped. If
    several programs share a tile, the one with its first columns adds up the parts that the others store in
    ``partials`` [programs, 128 * 384] and announce in ``arrived`` [2, programs], which is zero between launches. A
    program stores its part before it does anything else with tiles of that height, so no two programs wait for each
    other.
    """
    gl.inline_asm_elementwise(LET_NEXT_START, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    base_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, BK], base.layout)
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TALL, BK], x.layout)
    room = gl.allocate_shared_memory(gl.bfloat16, [LOW, BN], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    linear = (table, parts, width, second, third)
    rings = (base_tiles, x_tiles, full, empty)
    tall_kind, low_kind = kinds_of(tall * width, low * width, K // 128, programs, tall_shared, low_shared)
    tall_tiles = ((rows, tall), tall_kind)
    low_tiles = ((rows + tall * 4, low), low_kind)
    gl.warp_specialize(
        [
            (multiply, ((y, out, room), linear, rings, (partials, arrived), tall_tiles, low_tiles, K, CODEC, STAGES)),
            (copy, (x, base, linear, rings, tall_tiles, low_tiles, K, CODEC, STAGES)),
        ],
        [1],
        [24],
    )
