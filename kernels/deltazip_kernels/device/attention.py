"""The kernels behind ``deltazip_kernels.attention``.

A program does one item of work for one KV head: rows of one sequence, and a range of its keys. An item is FIELDS
numbers: first row, number of rows, first key, end of the keys, where the sequence's pages begin in ``pages``, position
of the first row, number of items of the sequence, and the first of these items.
"""

import triton
import triton.language as tl

from deltazip_kernels.device.locate import let_next_start, wait

FIELDS = tl.constexpr(8)
NEVER = tl.constexpr(-1e30)
"""The score of a key that is not seen. It is finite, so a tile with no other score makes no NaN; its result is rubbish,
but the next tile multiplies that by 0."""
TOGETHER = tl.constexpr(4)
"""Parts that are loaded at once when they are merged."""


@triton.jit
def _scaled(s, factor, CAP: tl.constexpr):
    """Scores in units of log2, from products of queries and keys."""
    s *= factor
    if CAP != 0.0:
        s = CAP * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp(tl.minimum(s * (2.0 / CAP), 80.0)) + 1.0))
    return s


@triton.jit
def _place(rows, row, head, column, HEADS: tl.constexpr, D: tl.constexpr):
    """Pointers [M, WIDTH] into ``rows`` [rows, HEADS, D]."""
    return rows + ((row * HEADS + head).to(tl.int64) * D)[:, None] + column[None, :]


# The lists may begin anywhere, and that shall not take several kernels.
@triton.jit(do_not_specialize_on_alignment=["pages", "items"])
def attention_prefill(
    q, keys, values, scales, pages, page_stride, row_stride, scale_stride, items, out, factor,
    CAP: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write causal attention of ``items`` to their rows of ``out``. A tile's rows are heads of one or more queries."""
    let_next_start(OVERLAP)
    head = tl.program_id(0) % HEADS
    item = items + tl.program_id(0) // HEADS * FIELDS
    row = tl.load(item)
    rows = tl.load(item + 1)
    start = tl.load(item + 2)
    stop = tl.load(item + 3)
    pages += tl.load(item + 4)
    position = tl.load(item + 5)
    wait(OVERLAP)
    r = tl.arange(0, M)
    column = tl.arange(0, WIDTH)
    exists = column < D
    real = (r < rows * G)[:, None] & exists[None, :]
    tile = tl.load(_place(q, row + r // G, head * G + r % G, column, HEADS * G, D), mask=real, other=0.0)
    if SCALED and tile.dtype == tl.bfloat16:
        tile = tile.to(tl.float16)  # one instruction converts e4m3 to it, exactly
    query = position + r // G
    top = tl.full((M,), NEVER, tl.float32)
    weight = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, WIDTH), tl.float32)
    for first in tl.range(start, stop, N, num_stages=STAGES):
        key = first + tl.arange(0, N)
        inside = key < stop
        page = tl.load(pages + key // PAGE, mask=inside, other=0).to(tl.int64)
        at = page * page_stride + (key % PAGE) * row_stride + head * D
        k = tl.load(keys + at[None, :] + column[:, None], mask=inside[None, :] & exists[:, None], other=0.0)
        s = tl.dot(tile, k.to(tile.dtype), input_precision="ieee")
        scale = scales + page * scale_stride + head * PAGE + key % PAGE
        if SCALED:
            s *= tl.load(scale, mask=inside, other=0.0)[None, :]
        ahead = query[:, None] - key[None, :]
        seen = inside[None, :] & (ahead >= 0)
        if WINDOW:
            seen = seen & (ahead < WINDOW)
        s = tl.where(seen, _scaled(s, factor, CAP), NEVER)
        highest = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - highest[:, None])
        shrink = tl.exp2(top - highest)
        weight = weight * shrink + tl.sum(p, axis=1)
        v = tl.load(values + at[:, None] + column[None, :], mask=inside[:, None] & exists[None, :], other=0.0)
        if SCALED:
            # The largest scale goes to the sum: weights times small scales might underflow in q's type.
            v_scale = tl.load(scale + HEADS * PAGE, mask=inside, other=0.0)
            largest = tl.maximum(tl.max(v_scale, axis=0), 1e-30)
            p *= (v_scale / largest)[None, :]
            found = tl.dot(p.to(tile.dtype), v.to(tile.dtype), input_precision="ieee")
            sums = sums * shrink[:, None] + found * largest
        else:
            sums = tl.dot(p.to(tile.dtype), v, sums * shrink[:, None], input_precision="ieee")
        top = highest
    result = (sums / weight[:, None]).to(out.dtype.element_ty)
    tl.store(_place(out, row + r // G, head * G + r % G, column, HEADS * G, D), result, mask=real)


@triton.jit
def _runs(base, step, W: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr):
    """[W, N]: from each of ``base`` [W * N / RUN], RUN numbers that are ``step`` apart."""
    return tl.reshape(base[:, None] + (tl.arange(0, RUN) * step)[None, :], (W, N))


@triton.jit
def _merge(
    parts, weights, first, count, out, head,
    HEADS: tl.constexpr, G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge ``count`` parts, from ``first`` on, in their order, and write the row at ``out``.

    All heads lie in one dimension, so that a thread has its own number's weights; in two, threads would exchange them.
    """
    i = tl.arange(0, M * WIDTH)
    row = head * G + i // WIDTH
    column = i % WIDTH
    real = (i // WIDTH < G) & (column < D)
    top = tl.full((M * WIDTH,), NEVER, tl.float32)
    weight = tl.zeros((M * WIDTH,), tl.float32)
    sums = tl.zeros((M * WIDTH,), tl.float32)
    for part in tl.range(first, first + count, loop_unroll_factor=TOGETHER):
        at = (part * (HEADS * G) + row).to(tl.int64)
        its_top = tl.load(weights + at * 2, mask=real, other=NEVER, cache_modifier=".cg")
        its_weight = tl.load(weights + at * 2 + 1, mask=real, other=1.0, cache_modifier=".cg")
        found = tl.load(parts + at * D + column, mask=real, other=0.0, cache_modifier=".cg")
        highest = tl.maximum(top, its_top)
        share = tl.exp2(its_top - highest)
        shrink = tl.exp2(top - highest)
        weight = weight * shrink + its_weight * share
        sums = sums * shrink + found * share
        top = highest
    tl.store(out + row * D + column, (sums / weight).to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize_on_alignment=["pages", "items"])
def attention_decode(
    q, keys, values, scales, pages, page_stride, row_stride, scale_stride, items, out, factor, parts, weights, arrived,
    CAP: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
    M: tl.constexpr, W: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write attention of ``items`` to ``out``. Each has one row, which sees all of its keys, or none.

    Each of W warps has keys of its own, N at a time; their results are joined at the end. If a sequence has several
    items, each stores its sums in ``parts`` [items, HEADS * G, D], and their highest score and weight in ``weights``
    [items, HEADS * G, 2], all float32. The last one to finish, by ``arrived`` [items * HEADS], merges all of them.
    """
    work = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    # The launch ahead does not write the list of items, so it may be read before that launch has ended.
    item = items + work * FIELDS
    row = tl.load(item)
    rows = tl.load(item + 1)
    start = tl.load(item + 2)
    stop = tl.load(item + 3)
    pages += tl.load(item + 4)
    count = tl.load(item + 6)
    begin = tl.load(item + 7)
    wait(OVERLAP)
    if rows == 0:
        return
    r = tl.arange(0, M)
    column = tl.arange(0, WIDTH)
    exists = column < D
    real = (r < G)[:, None] & exists[None, :]
    tile = tl.load(_place(q, row, head * G + r, column, HEADS * G, D), mask=real, other=0.0)
    if SCALED and tile.dtype == tl.bfloat16:
        tile = tile.to(tl.float16)  # one instruction converts e4m3 to it, exactly
    tile = tl.broadcast_to(tl.trans(tile)[None, :, :], (W, WIDTH, M))
    top = tl.full((W, M), NEVER, tl.float32)
    weight = tl.zeros((W, M), tl.float32)
    sums = tl.zeros((W, WIDTH, M), tl.float32)
    for first in tl.range(start // RUN * RUN, stop, W * N, num_stages=STAGES):
        # RUN keys are adjacent in a page: one lookup for each run, not for each key.
        run = (first + tl.arange(0, W * N // RUN) * RUN).to(tl.uint32)
        page = tl.load(pages + run // PAGE, mask=run < stop, other=0).to(tl.int64)
        token = (run % PAGE).to(tl.int64)
        at = _runs(page * page_stride + token * row_stride + head * D, row_stride, W, N, RUN)
        key = first + tl.arange(0, W)[:, None] * N + tl.arange(0, N)[None, :]
        seen = (key >= start) & (key < stop)
        mask = seen[:, :, None] & exists[None, None, :]
        k = tl.load(keys + at[:, :, None] + column[None, None, :], mask=mask, other=0.0)
        s = tl.dot(k.to(tile.dtype), tile, input_precision="ieee")
        scale = scales + _runs(page * scale_stride + token + head * PAGE, 1, W, N, RUN)
        if SCALED:
            s *= tl.load(scale, mask=seen, other=0.0)[:, :, None]
        s = tl.where(seen[:, :, None], _scaled(s, factor, CAP), NEVER)
        highest = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - highest[:, None, :])
        shrink = tl.exp2(top - highest)
        weight = weight * shrink + tl.sum(p, axis=1)
        sums *= shrink[:, None, :]
        mask = seen[:, None, :] & exists[None, :, None]
        v = tl.load(values + at[:, None, :] + column[None, :, None], mask=mask, other=0.0)
        if SCALED:
            # The largest scale goes to the sum: weights times small scales might underflow in q's type.
            v_scale = tl.load(scale + HEADS * PAGE, mask=seen, other=0.0)
            largest = tl.maximum(tl.max(v_scale, axis=1), 1e-30)
            p *= (v_scale / largest[:, None])[:, :, None]
            found = tl.dot(v.to(tile.dtype), p.to(tile.dtype), input_precision="ieee")
            sums += found * largest[:, None, None]
        else:
            sums = tl.dot(v, p.to(tile.dtype), sums, input_precision="ieee")
        top = highest
    # Not earlier: a GEMM that starts early would fetch weights while this needs the bandwidth for keys.
    let_next_start(OVERLAP)
    highest = tl.max(top, axis=0)
    share = tl.exp2(top - highest[None, :])
    weight = tl.sum(weight * share, axis=0)
    sums = tl.trans(tl.sum(sums * share[:, None, :], axis=0))
    target = _place(out, row, head * G + r, column, HEADS * G, D)
    if count == 1:
        tl.store(target, (sums / weight[:, None]).to(out.dtype.element_ty), mask=real)
        return
    tl.store(_place(parts, work, head * G + r, column, HEADS * G, D), sums, mask=real)
    left = weights + ((work * HEADS + head) * G + r) * 2
    tl.store(left, highest, mask=r < G)
    tl.store(left + 1, weight, mask=r < G)
    tl.debug_barrier()  # all threads must have stored before one of them counts the item
    counter = arrived + begin * HEADS + head
    if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
        tl.store(counter, 0)
        _merge(parts, weights, begin, count, out + row.to(tl.int64) * (HEADS * G * D), head, HEADS, G, M, D, WIDTH)
