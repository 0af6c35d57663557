"""The kernels behind ``deltazip_kernels.attention``.

A program has one item of work for one KV head: the rows of its tile are the query heads that share it, of one or more
queries, and its keys are a range of one sequence's. An item is FIELDS numbers: first row, rows, first key, end key,
where the sequence's pages begin in ``pages``, position of the first row, parts of its sequence; the last is not used.
"""

import triton
import triton.language as tl

from deltazip_kernels.device.locate import let_next_start, wait

FIELDS = tl.constexpr(8)
NEVER = tl.constexpr(-1e30)
"""The score of a key that is not seen. Finite: a tile with no other leaves rubbish, which the next one weighs by 0."""
TOGETHER = tl.constexpr(8)
"""Parts that are loaded at once when they are merged."""


@triton.jit
def _scores(q, k, k_scale, inside, factor, CAP: tl.constexpr, SCALED: tl.constexpr):
    """``q k`` [M, N] in units of log2, scaled and capped."""
    s = tl.dot(q, k, input_precision="ieee")
    if SCALED:
        s *= tl.load(k_scale, mask=inside, other=0.0)[None, :]
    s *= factor
    if CAP != 0.0:
        s = CAP * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp(tl.minimum(s * (2.0 / CAP), 80.0)) + 1.0))
    return s


@triton.jit
def _attend(
    q, keys, values, scales, pages, page_stride, row_stride, scale_stride, head, start, stop, position, factor,
    CAP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, G: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr, HEADS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention [M, WIDTH] over keys ``start`` to ``stop``, and the logarithms [M] to base 2 of its sums of weights."""
    column = tl.arange(0, WIDTH)
    exists = column < D
    if SCALED and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # as which the numbers of e4m3 are exact, and converted in one instruction
    query = position + tl.arange(0, M) // G
    top = tl.full((M,), NEVER, tl.float32)
    weight = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, WIDTH), tl.float32)
    for first in tl.range(start, stop, N, num_stages=STAGES):
        key = first + tl.arange(0, N)
        inside = key < stop
        page = tl.load(pages + key // PAGE, mask=inside, other=0).to(tl.int64)
        at = page * page_stride + (key % PAGE) * row_stride + head * D
        k = tl.load(keys + at[None, :] + column[:, None], mask=inside[None, :] & exists[:, None], other=0.0)
        scale = scales + page * scale_stride + head * PAGE + key % PAGE
        s = _scores(q, k.to(q.dtype), scale, inside, factor, CAP, SCALED)
        seen = inside[None, :]
        if CAUSAL:
            ahead = query[:, None] - key[None, :]
            seen = seen & (ahead >= 0)
            if WINDOW:
                seen = seen & (ahead < WINDOW)
        s = tl.where(seen, s, NEVER)
        highest = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - highest[:, None])
        shrink = tl.exp2(top - highest)
        weight = weight * shrink + tl.sum(p, axis=1)
        v = tl.load(values + at[:, None] + column[None, :], mask=inside[:, None] & exists[None, :], other=0.0)
        if SCALED:
            # The scales' largest goes to the sum: with it, small ones might not be numbers of q's type.
            v_scale = tl.load(scale + HEADS * PAGE, mask=inside, other=0.0)
            largest = tl.maximum(tl.max(v_scale, axis=0), 1e-30)
            p *= (v_scale / largest)[None, :]
            sums = sums * shrink[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee") * largest
        else:
            sums = tl.dot(p.to(q.dtype), v.to(q.dtype), sums * shrink[:, None], input_precision="ieee")
        top = highest
    return sums / weight[:, None], top + tl.log2(weight)


@triton.jit
def _place(rows, row, head, column, HEADS: tl.constexpr, D: tl.constexpr):
    """Pointers [M, WIDTH] into ``rows`` [rows, HEADS, D]."""
    return rows + ((row * HEADS + head).to(tl.int64) * D)[:, None] + column[None, :]


# Lists begin anywhere: one kernel for all of them.
@triton.jit(do_not_specialize_on_alignment=["pages", "items"])
def attention(
    q, keys, values, scales, pages, page_stride, row_stride, scale_stride, items, out, parts, logs, factor,
    CAP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention of ``items`` to their rows of ``out``; items without rows are none.

    One that is a part of several goes to the row of ``parts`` [items, HEADS * G, D] and of ``logs`` that is its number,
    in float32, for :func:`attention_merge`. Without CAUSAL all items have one row, which sees all their keys.
    """
    let_next_start(OVERLAP)
    work = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    # The list of items is older than the launch ahead of this one: it may be read before that has ended.
    item = items + work * FIELDS
    row = tl.load(item)
    rows = tl.load(item + 1)
    start = tl.load(item + 2)
    stop = tl.load(item + 3)
    pages += tl.load(item + 4)
    position = tl.load(item + 5)
    whole = tl.load(item + 6) == 1
    wait(OVERLAP)
    if rows > 0:
        r = tl.arange(0, M)
        column = tl.arange(0, WIDTH)
        real = (r < rows * G)[:, None] & (column < D)[None, :]
        tile = tl.load(_place(q, row + r // G, head * G + r % G, column, HEADS * G, D), mask=real, other=0.0)
        result, log = _attend(
            tile, keys, values, scales, pages, page_stride, row_stride, scale_stride, head, start, stop, position,
            factor, CAP, WINDOW, CAUSAL, G, PAGE, D, WIDTH, SCALED, HEADS, M, N, STAGES,
        )  # fmt: skip
        if CAUSAL or whole:
            rounded = result.to(out.dtype.element_ty)
            tl.store(_place(out, row + r // G, head * G + r % G, column, HEADS * G, D), rounded, mask=real)
        else:
            tl.store(_place(parts, work + 0 * r, head * G + r, column, HEADS * G, D), result, mask=real)
            tl.store(logs + (work * HEADS + head) * G + r, log, mask=r < G)


@triton.jit(do_not_specialize_on_alignment=["items", "firsts"])
def attention_merge(
    parts, logs, items, firsts, out,
    HEADS: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head in row ``i`` of a launch of :func:`attention`.

    Its parts are items ``firsts[i]`` to ``firsts[i + 1]``; a single one is in its place already.
    """
    let_next_start(OVERLAP)
    i = tl.program_id(0)
    first = tl.load(firsts + i)
    stop = tl.load(firsts + i + 1)
    row = tl.load(items + first * FIELDS)
    wait(OVERLAP)
    if stop - first > 1:
        g = tl.arange(0, GROUP)
        column = tl.arange(0, WIDTH)
        head = tl.program_id(1) * G + g
        top = tl.full((GROUP,), NEVER, tl.float32)
        weight = tl.zeros((GROUP,), tl.float32)
        sums = tl.zeros((GROUP, WIDTH), tl.float32)
        for some in tl.range(first, stop, TOGETHER):
            part = some + tl.arange(0, TOGETHER)
            at = part[:, None] * (HEADS * G) + head[None, :]
            real = (part < stop)[:, None] & (g < G)[None, :]
            log = tl.load(logs + at, mask=real, other=NEVER)
            mask = real[:, :, None] & (column < D)[None, None, :]
            found = tl.load(parts + at[:, :, None] * D + column[None, None, :], mask=mask, other=0.0)
            highest = tl.maximum(top, tl.max(log, axis=0))
            share = tl.exp2(log - highest[None, :])
            shrink = tl.exp2(top - highest)
            weight = weight * shrink + tl.sum(share, axis=0)
            sums = sums * shrink[:, None] + tl.sum(found * share[:, :, None], axis=0)
            top = highest
        result = (sums / weight[:, None]).to(out.dtype.element_ty)
        real = (g < G)[:, None] & (column < D)[None, :]
        tl.store(_place(out, row + 0 * g, head, column, HEADS * G, D), result, mask=real)
