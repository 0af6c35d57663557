"""The assignment of a flat batch's rows to versions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltazip_kernels import Segments
from deltazip_kernels.fused import RowTiles
from deltazip_kernels.plan import Work
from deltazip_ray.layers.staging import to_device


@dataclass(frozen=True)
class Span:
    """Consecutive rows ``start:stop`` of one slot."""

    slot: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Rows:
    """The rows of a flat batch, sorted by slot, as the host and as the device need them."""

    index: torch.Tensor
    """``[rows]`` int32, slot + 1: picks from tables that keep the base in row 0."""
    spans: tuple[Span, ...] = ()
    """Segments of versions, if the host knows them: a captured step serves any."""
    segments: Segments | None = None
    """All segments, the base's too, on the device; for the torch backend only."""
    work: Work | None = None
    """The grouped kernels' work: all segments of versions that are not ``merged``. None if there are none."""
    rounded: int = 0
    """The grouped kernels read no row from this one on, so only those before it are rounded to int8."""
    merged: tuple[Span, ...] = ()
    """Long segments, which are multiplied with the sum of base and delta."""
    tiles: RowTiles | None = None
    """Those of ``merged`` that the fused kernel takes, cut into its tiles; the others need a scratch weight."""

    def short_runs(self) -> list[tuple[int, int]]:
        """Start and end of the rows before, between and after long segments; some may be empty."""
        starts = (0, *(span.stop for span in self.merged))
        stops = (*(span.start for span in self.merged), len(self.index))
        return list(zip(starts, stops, strict=True))


def join_runs(runs: Sequence[tuple[int, int]]) -> tuple[Span, ...]:
    """Spans of all slots, from ``(slot, rows)`` runs in batch order; adjacent runs of one slot are joined."""
    spans: list[Span] = []
    end = 0
    for slot, length in runs:
        start, end = end, end + length
        if spans and spans[-1].slot == slot:
            start = spans.pop().start
        spans.append(Span(slot, start, end))
    return tuple(spans)


def send_segments(spans: Sequence[Span], device: torch.device) -> Segments:
    """The table of segments for kernels; ``spans`` cover all rows."""
    starts = np.array([0, *(span.stop for span in spans)], dtype=np.int32)
    slots = np.array([span.slot for span in spans], dtype=np.int32)
    return Segments(to_device(starts, device), to_device(slots, device))


def send_index(spans: Sequence[Span], device: torch.device) -> torch.Tensor:
    """``[rows]`` int32, slot + 1 of every row."""
    slots = np.array([span.slot + 1 for span in spans], dtype=np.int32)
    lengths = np.array([span.stop - span.start for span in spans], dtype=np.int64)
    return to_device(np.repeat(slots, lengths), device)
