"""The work list of a step: which rows of which slot each program of a fixed grid takes, made on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltazip_kernels.delta import Segments
from deltazip_kernels.device.plan import write_items
from deltazip_kernels.launch import launch, power_of_2

SOME, MORE, MANY = 16, 32, 64
"""Rows of a work item. Segments of up to MORE rows are cut into items of SOME rows where most are much shorter and else
kept whole; longer ones are cut into items of MANY."""
_SEGMENTS = 64
"""Plans of up to so many segments share one compiled kernel."""
COUNTERS, PARTIALS = 256, 1 << 21
"""Of each list: tiles that programs can share, and floats in which these leave their sums."""


@dataclass(frozen=True)
class Work:
    """Items of up to ``batch`` rows: ``items`` [limit, 4] int32 are slot (-1: idle), first row, end row, unused.

    ``turn`` is 0 for the only list of a plan, 1 and 2 for the first and the second: as no row is in both, the second's
    launch runs beside the first's, which it must follow with nothing between that makes what both read. ``sparse`` says
    that segments have few rows on average. Programs that share a tile along K count themselves in ``arrived``
    [COUNTERS] int32, zero between launches, and leave their sums in ``partials`` [PARTIALS] float32.
    """

    items: Tensor
    batch: int
    arrived: Tensor
    partials: Tensor
    turn: int = 0
    sparse: bool = False


def in_halves(lengths: Sequence[int]) -> bool:
    """Whether segments of these rows share one list: a few are little longer than ``MORE``, and are cut in two."""
    long = [length for length in lengths if length > MORE]
    return 0 < 4 * len(long) <= len(lengths) and max(long) <= 2 * MORE


def plan(
    segments: Segments, rows: int, longest: int | None = None, shortest: int = 0, *, halves: bool = False
) -> tuple[Work, ...]:
    """The work of a batch of ``rows`` rows: a launch for each of the lists that segments may need.

    ``longest`` and ``shortest`` bound the rows of a segment that has a slot, where the caller knows: it saves work and
    launches. With ``halves`` (:func:`in_halves`) none is longer than twice ``MORE``. The lists' sizes depend on these,
    ``rows`` and the number of segments: a captured graph serves any mixture.
    """
    count = segments.slots.numel()
    longest = rows if longest is None else min(rows, longest)
    if count == 0 or longest == 0:
        return ()
    device = segments.slots.device
    sparse = 4 * rows <= SOME * count
    batch = SOME if sparse or longest <= SOME else MORE
    # Each segment adds at most one item that is not full; at most rows // n segments have n rows or more.
    full = rows // batch if halves or batch < min(longest, MORE) else 0
    short = min(count + full, rows) if halves or shortest <= MORE else 0
    long = min(count, rows // (MORE + 1)) + rows // MANY if longest > MORE and not halves else 0
    items = torch.empty((short + long, 4), dtype=torch.int32, device=device)
    arrived = torch.empty((2, COUNTERS), dtype=torch.int32, device=device)
    partials = torch.empty((2 if long else 1, PARTIALS), dtype=torch.float32, device=device)
    launch(
        write_items,
        (1,),
        segments.starts,
        segments.slots,
        items,
        arrived,
        count,
        short,
        long,
        batch,
        MORE if long else 2 * MORE,
        WIDTH=max(_SEGMENTS, power_of_2(count)),
        LONG=MANY,
        COUNTERS=2 * COUNTERS,
        num_warps=4,
    )
    if not short or not long:
        return (Work(items, batch if short else MANY, arrived[0], partials[0], sparse=sparse),)
    first = Work(items[:short], batch, arrived[0], partials[0], 1, sparse)
    return first, Work(items[short:], MANY, arrived[1], partials[1], 2)
