"""The work list of a step: which rows of which slot each program of a fixed grid takes, made on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltazip_kernels.delta import Segments
from deltazip_kernels.device.plan import write_items
from deltazip_kernels.launch import launch, power_of_2

SOME, MORE, MANY = 16, 32, 64
"""Rows that the items of a list may have, by the longest segment; longer ones are cut. Where most segments are much
shorter they are SOME, where no more than half are longer than MORE they may be MORE."""
_SEGMENTS = 64
"""Plans of up to so many segments share one compiled kernel."""
COUNTERS, PARTIALS = 256, 1 << 21
"""Tiles that programs can share, and floats in which these leave their sums."""


@dataclass(frozen=True)
class Work:
    """Items of up to ``batch`` rows: ``items`` [limit, 4] int32 are slot (-1: idle), first row, end row, unused.

    ``sparse`` says that segments have few rows on average. Programs that share a tile along K count themselves in
    ``arrived`` [COUNTERS] int32, zero between launches, and leave their sums in ``partials`` [PARTIALS] float32.
    """

    items: Tensor
    batch: int
    arrived: Tensor
    partials: Tensor
    sparse: bool = False


def in_halves(lengths: Sequence[int]) -> bool:
    """Whether segments of these rows make items of ``MORE``: longer ones, half of them at most, are cut in two."""
    long = [length for length in lengths if length > MORE]
    return 0 < 2 * len(long) <= len(lengths) and max(long) <= 2 * MORE


def plan(segments: Segments, rows: int, longest: int | None = None, *, halves: bool = False) -> Work | None:
    """The work of a batch of ``rows`` rows, None where there is none.

    ``longest`` bounds the rows of a segment that has a slot, where the caller knows; ``halves`` is :func:`in_halves`.
    The list's size depends on these, ``rows`` and the number of segments: a captured graph serves any mixture.
    """
    count = segments.slots.numel()
    longest = rows if longest is None else min(rows, longest)
    if count == 0 or longest == 0:
        return None
    device = segments.slots.device
    sparse = 4 * rows <= SOME * count
    widest = SOME if sparse else MORE if halves else longest
    batch = next((most for most in (SOME, MORE) if widest <= most), MANY)
    # Each segment adds at most one item that is not full.
    full = 0 if longest <= batch else count // 2 if batch == MORE else rows // batch
    limit = min(count + full, rows)
    items = torch.empty((limit, 4), dtype=torch.int32, device=device)
    arrived = torch.empty(COUNTERS, dtype=torch.int32, device=device)
    partials = torch.empty(PARTIALS, dtype=torch.float32, device=device)
    launch(
        write_items,
        (1,),
        segments.starts,
        segments.slots,
        items,
        arrived,
        count,
        limit,
        batch,
        WIDTH=max(_SEGMENTS, power_of_2(count)),
        COUNTERS=COUNTERS,
        num_warps=4,
    )
    return Work(items, batch, arrived, partials, sparse)
