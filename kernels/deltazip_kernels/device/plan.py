"""The kernel behind ``deltazip_kernels.plan``."""

import triton
import triton.language as tl

_CHUNK = tl.constexpr(32)


@triton.jit(do_not_specialize=["starts", "slots", "S", "limit", "batch"])
def write_items(starts, slots, items, arrived, S, limit, batch, WIDTH: tl.constexpr, COUNTERS: tl.constexpr):
    """Cut S segments into items of ``batch`` rows. The rest of the ``limit`` items are idle.

    Also sets the COUNTERS counters ``arrived`` to zero.
    """
    tl.store(arrived + tl.arange(0, COUNTERS), 0)
    s = tl.arange(0, WIDTH)
    slot = tl.load(slots + s, mask=s < S, other=-1)
    first = tl.load(starts + s, mask=s < S, other=0)
    end = tl.load(starts + s + 1, mask=s < S, other=0)
    blocks = tl.where(slot >= 0, tl.cdiv(end - first, batch), 0)
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
