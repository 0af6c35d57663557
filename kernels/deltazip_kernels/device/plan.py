"""The kernel behind ``deltazip_kernels.plan``."""

import triton
import triton.language as tl

_CHUNK = tl.constexpr(32)


@triton.jit
def _write(items, limit, slot, first, end, wanted, batch):
    """Cut the ``wanted`` segments into blocks of ``batch`` rows, one item each; the others of ``limit`` are idle."""
    blocks = tl.where(wanted, tl.cdiv(end - first, batch), 0)
    after = tl.cumsum(blocks, 0)
    before = after - blocks
    for at in tl.range(0, limit, _CHUNK):
        item = at + tl.arange(0, _CHUNK)
        # The segment of an item is the one whose range of items [before, after) holds it.
        mine = (item[:, None] < after[None, :]) & (item[:, None] >= before[None, :])
        row = tl.sum(tl.where(mine, first[None, :] + (item[:, None] - before[None, :]) * batch, 0), 1)
        last = tl.sum(tl.where(mine, end[None, :], 0), 1)
        owner = tl.sum(tl.where(mine, slot[None, :] + 1, 0), 1) - 1
        inside = item < limit
        tl.store(items + item * 4, owner, mask=inside)
        tl.store(items + item * 4 + 1, row, mask=inside)
        tl.store(items + item * 4 + 2, tl.minimum(row + batch, last), mask=inside)


@triton.jit(do_not_specialize=["starts", "slots", "S", "short_limit", "long_limit", "short", "cut"])
def write_items(
    starts,
    slots,
    items,
    arrived,
    S,
    short_limit,
    long_limit,
    short,
    cut,
    WIDTH: tl.constexpr,
    LONG: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """Segments of up to ``cut`` rows to ``items[:short_limit]``, longer ones to the ``long_limit`` items after them.

    The COUNTERS ``arrived`` become zero.
    """
    tl.store(arrived + tl.arange(0, COUNTERS), 0)
    s = tl.arange(0, WIDTH)
    slot = tl.load(slots + s, mask=s < S, other=-1)
    first = tl.load(starts + s, mask=s < S, other=0)
    end = tl.load(starts + s + 1, mask=s < S, other=0)
    length = tl.where(slot >= 0, end - first, 0)
    _write(items, short_limit, slot, first, end, (length > 0) & (length <= cut), short)
    _write(items + short_limit * 4, long_limit, slot, first, end, length > cut, LONG)
