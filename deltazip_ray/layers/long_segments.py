"""Divides the rows of a step among the products that serve them.

Short segments share one grouped launch beside the base's product. A long one is multiplied with the sum of base and
delta: by the fused kernel, or over a scratch weight. What counts as long depends on the codecs of the version's deltas,
so this keeps count of them. ``docs/kernels.md`` has a table of all cases.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from deltazip_kernels import PackedDelta
from deltazip_kernels.fused import FUSED_ALONE_ROWS, FUSED_CODECS, FUSED_ROWS, SCRATCH_ROWS, RowTiles, cut_rows
from deltazip_kernels.merged import MERGE_ROWS
from deltazip_kernels.plan import Work, in_halves, plan
from deltazip_ray.layers.rows import Rows, Span, join_runs, send_index, send_segments
from deltazip_ray.layers.staging import to_device


class LongSegments:
    """Thread-safe: loads change slots while steps are launched."""

    def __init__(self, *, fused: bool) -> None:
        """``fused``: whether the fused kernel runs on this GPU, over this base."""
        self._fused = fused
        self._lock = threading.Lock()
        self._counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
        """For each slot, the number of deltas in each codec."""

    def replace(self, slot: int, before: PackedDelta | None, after: PackedDelta | None) -> None:
        """Record that one delta of ``slot`` takes the place of another."""
        with self._lock:
            for delta, change in ((before, -1), (after, 1)):
                if delta is not None:
                    self._counts[slot][delta.codec] += change

    def rows(self, runs: Sequence[tuple[int, int]], device: torch.device) -> Rows:
        """The rows of a step from ``(slot, rows)`` runs in batch order; see :class:`Rows`."""
        spans = join_runs(runs)
        versions = tuple(span for span in spans if span.slot >= 0)
        alone = len(spans) == 1
        merged = tuple(span for span in versions if span.rows >= self._least(span.slot, alone=alone))
        work, rounded = _plan_short(spans, merged, device)
        # A slot with decodes and prompts has two spans; the fused product does all or none of a slot.
        scratch = {span.slot for span in merged if span.rows >= self._most(span.slot)}
        fused = [span for span in merged if span.slot not in scratch]
        tiles = _cut(fused, device) if fused else None
        return Rows(send_index(spans, device), versions, None, work, rounded, merged, tiles)

    def _least(self, slot: int, *, alone: bool) -> int:
        """The fewest rows of a long segment; ``alone``: it is all of the step."""
        if not self._fused or self._codecs(slot) - {*FUSED_CODECS}:
            return MERGE_ROWS
        return FUSED_ALONE_ROWS if alone else FUSED_ROWS

    def _most(self, slot: int) -> int:
        """The fewest rows for which a scratch weight is cheaper than the fused product."""
        return max((SCRATCH_ROWS.get(codec, 0) for codec in self._codecs(slot)), default=0)

    def _codecs(self, slot: int) -> set[str]:
        return {codec for codec, count in self._counts[slot].items() if count}


def _plan_short(spans: Sequence[Span], merged: Sequence[Span], device: torch.device) -> tuple[Work | None, int]:
    """The grouped launches' work for versions that are not ``merged``, and up to which row they have any."""
    short = [span for span in spans if span.slot >= 0 and span not in merged]
    if not short:
        return None, 0
    end = short[-1].stop
    # To these launches a merged segment is one of the base: there is nothing to add.
    first = [Span(-1, span.start, span.stop) if span in merged else span for span in spans if span.stop <= end]
    lengths = [span.rows for span in short]
    return plan(send_segments(first, device), end, max(lengths), halves=in_halves(lengths)), end


def _cut(spans: Sequence[Span], device: torch.device) -> RowTiles:
    def send(rows: list[list[int]]) -> torch.Tensor:
        return to_device(np.array(rows, dtype=np.int32), device)

    return cut_rows([(span.slot, span.start, span.stop) for span in spans], send)
