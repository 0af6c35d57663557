"""The work list of a step: which rows of which slot each program of a fixed grid takes, made on the device."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deltazip_kernels.delta import Segments
from deltazip_kernels.device.plan import write_items

BATCHES = (8, 16, 64)
"""The sizes of a block of rows: a segment of up to 8 rows is one block of 8, up to 16 one of 16, else blocks of 64."""
_CHUNK = 32


@dataclass(frozen=True)
class Work:
    """Blocks of ``batch`` rows: ``items`` [limit, 4] int32 are slot (-1: nothing to do), first row, end row, unused."""

    items: Tensor
    batch: int


def plan(segments: Segments, rows: int, longest: int | None = None) -> tuple[Work, ...]:
    """The work of a batch of ``rows`` rows, one list for each of BATCHES that segments may need.

    ``longest`` is an upper bound of a segment's rows, where the caller knows one: it saves launches. The lists' sizes
    depend on ``rows``, ``longest`` and the number of segments alone, so a captured graph serves any mixture.
    """
    count = segments.slots.numel()
    longest = rows if longest is None else min(rows, longest)
    if count == 0 or longest == 0:
        return ()
    shortest = [1, *(batch + 1 for batch in BATCHES[:-1])]
    # At most rows // n segments have n rows or more; only the last list cuts a segment into several blocks.
    limits = [min(count, rows // n) for n in shortest if n <= longest]
    if len(limits) == len(BATCHES):
        limits[-1] += rows // BATCHES[-1]
    items = torch.empty((sum(limits), 4), dtype=torch.int32, device=segments.slots.device)
    width = max(2, triton.next_power_of_2(count))
    write_items[(1,)](segments.starts, segments.slots, items, count, width, tuple(limits), BATCHES, _CHUNK, num_warps=4)
    return tuple(Work(part, batch) for part, batch in zip(items.split(limits), BATCHES, strict=False))
