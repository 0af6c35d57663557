"""The kernel behind ``deltazip_kernels.plan``."""

import triton
import triton.language as tl


@triton.jit
def write_items(
    starts,
    slots,
    items,
    S,
    S2: tl.constexpr,
    LIMITS: tl.constexpr,
    BATCHES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    s = tl.arange(0, S2)
    slot = tl.load(slots + s, mask=s < S, other=-1)
    first = tl.load(starts + s, mask=s < S, other=0)
    end = tl.load(starts + s + 1, mask=s < S, other=0)
    length = tl.where(slot >= 0, end - first, 0)
    for c in tl.static_range(0, len(LIMITS)):
        wanted = length > (BATCHES[c - 1] if c > 0 else 0)
        if c + 1 < len(LIMITS):
            wanted = wanted & (length <= BATCHES[c])
        blocks = tl.where(wanted, (length + BATCHES[c] - 1) // BATCHES[c], 0)
        after = tl.cumsum(blocks, 0)
        before = after - blocks
        for start in tl.range(0, LIMITS[c], CHUNK):
            item = start + tl.arange(0, CHUNK)
            # The segment of an item is the one whose range of items [before, after) holds it.
            mine = (item[:, None] < after[None, :]) & (item[:, None] >= before[None, :])
            row = tl.sum(tl.where(mine, first[None, :] + (item[:, None] - before[None, :]) * BATCHES[c], 0), 1)
            last = tl.sum(tl.where(mine, end[None, :], 0), 1)
            owner = tl.sum(tl.where(mine, slot[None, :] + 1, 0), 1) - 1
            inside = item < LIMITS[c]
            tl.store(items + item * 4, owner, mask=inside)
            tl.store(items + item * 4 + 1, row, mask=inside)
            tl.store(items + item * 4 + 2, tl.minimum(row + BATCHES[c], last), mask=inside)
        items += LIMITS[c] * 4
