"""The work list of a step: which rows of which slot each program of a fixed grid takes, made on the device."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deltazip_kernels.delta import Segments
from deltazip_kernels.device.plan import write_items

FEW, SOME, MANY = 8, 16, 64
"""Rows of a work item. Segments of up to SOME rows are one item, longer ones are cut into items of MANY."""


@dataclass(frozen=True)
class Work:
    """Items of up to ``batch`` rows: ``items`` [limit, 4] int32 are slot (-1: idle), first row, end row, unused."""

    items: Tensor
    batch: int


def plan(segments: Segments, rows: int, longest: int | None = None) -> tuple[Work, ...]:
    """The work of a batch of ``rows`` rows: a launch for each of the lists that segments may need.

    ``longest`` is an upper bound of a segment's rows, where the caller knows one: it saves work and launches. The
    lists' sizes depend on ``rows``, ``longest`` and the number of segments alone: a captured graph serves any mixture.
    """
    count = segments.slots.numel()
    longest = rows if longest is None else min(rows, longest)
    if count == 0 or longest == 0:
        return ()
    short = FEW if longest <= FEW else SOME
    # At most rows // n segments have n rows or more, and each adds at most one item that is not full.
    limits = [min(count, rows), min(count, rows // (SOME + 1)) + rows // MANY if longest > SOME else 0]
    items = torch.empty((sum(limits), 4), dtype=torch.int32, device=segments.slots.device)
    width = max(2, triton.next_power_of_2(count))
    write_items[(1,)](segments.starts, segments.slots, items, count, *limits, width, short, MANY, num_warps=4)
    works = (Work(items[: limits[0]], short), Work(items[limits[0] :], MANY))
    return works if limits[1] else works[:1]
