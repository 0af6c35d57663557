"""The work list of a step: which rows of which slot each program of a fixed grid takes, made on the device."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deltazip_kernels.delta import Segments
from deltazip_kernels.device.plan import write_items

SOME, MANY = 16, 64
"""Rows of a work item."""
SHORT = 32
"""Segments of up to SHORT rows are cut into items of SOME rows, longer ones into items of MANY."""


@dataclass(frozen=True)
class Work:
    """Items of up to ``batch`` rows: ``items`` [limit, 4] int32 are slot (-1: idle), first row, end row, unused.

    ``turn`` is 0 for the only list of a plan, 1 and 2 for the first and the second: as no row is in both, the second's
    launch runs beside the first's, which it must follow with nothing between that makes what both read. ``sparse`` says
    that segments have few rows on average.
    """

    items: Tensor
    batch: int
    turn: int = 0
    sparse: bool = False


def plan(segments: Segments, rows: int, longest: int | None = None) -> tuple[Work, ...]:
    """The work of a batch of ``rows`` rows: a launch for each of the lists that segments may need.

    ``longest`` is an upper bound of a segment's rows, where the caller knows one: it saves work and launches. The
    lists' sizes depend on ``rows``, ``longest`` and the number of segments alone: a captured graph serves any mixture.
    """
    count = segments.slots.numel()
    longest = rows if longest is None else min(rows, longest)
    if count == 0 or longest == 0:
        return ()
    # Each segment adds at most one item that is not full; at most rows // n segments have n rows or more.
    short = min(count + (rows // SOME if longest > SOME else 0), rows)
    long = min(count, rows // (SHORT + 1)) + rows // MANY if longest > SHORT else 0
    items = torch.empty((short + long, 4), dtype=torch.int32, device=segments.slots.device)
    width = max(2, triton.next_power_of_2(count))
    write_items[(1,)](segments.starts, segments.slots, items, count, short, long, width, SOME, MANY, SHORT, num_warps=4)
    sparse = 4 * rows <= SOME * count
    if not long:
        return (Work(items, SOME, sparse=sparse),)
    return Work(items[:short], SOME, 1, sparse), Work(items[short:], MANY, 2)
