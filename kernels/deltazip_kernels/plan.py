"""The work list of a step, made on the device: the rows and the slot of every program of a fixed grid."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltazip_kernels.delta import Segments
from deltazip_kernels.device.plan import write_items
from deltazip_kernels.launch import launch, power_of_2

SOME, MORE, MANY = 16, 32, 64
"""The possible maximum rows of an item: the least that holds the longest segment, or MANY; longer segments are cut.
It is SOME if most segments are much shorter, and may be MORE if at most half are longer than that."""
_SEGMENTS = 64
"""Plans of up to this many segments share one compiled kernel."""
COUNTERS, PARTIALS = 256, 1 << 21
"""The maximum number of tiles that several programs share, and of floats for their partial sums."""


@dataclass(frozen=True)
class Work:
    """Items of up to ``batch`` rows: ``items`` [limit, 4] int32 has slot (-1: idle), first row, end row, unused.

    ``sparse``: segments have few rows on average. Programs that share a tile along K are counted in ``arrived``
    [COUNTERS] int32, which is zero between launches, and store their sums in ``partials`` [PARTIALS] float32.
    """

    items: Tensor
    batch: int
    arrived: Tensor
    partials: Tensor
    sparse: bool = False


def in_halves(lengths: Sequence[int]) -> bool:
    """Whether to cut segments of these rows into items of ``MORE`` rows: half at most are longer, none over twice."""
    long = [length for length in lengths if length > MORE]
    return 0 < 2 * len(long) <= len(lengths) and max(long) <= 2 * MORE


def plan(segments: Segments, rows: int, longest: int | None = None, *, halves: bool = False) -> Work | None:
    """The work of a batch of ``rows`` rows; None if there is none.

    ``longest``: no segment that has a slot is longer, if the caller knows that. ``halves``: :func:`in_halves` holds for
    these segments. The size of the list depends on the arguments, but not on what ``segments`` contains, so a captured
    graph serves any mixture.
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
