"""Which rows of a flat batch belong to which version."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltazip_kernels import Segments
from deltazip_kernels.plan import Work

BASE_SLOT = -1


@dataclass(frozen=True)
class Span:
    """Consecutive rows ``start:stop`` of one slot."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True)
class Rows:
    """The rows of one flat batch, sorted by slot; the same facts for the host and for the device."""

    index: torch.Tensor
    """``[rows]`` int32, slot + 1: picks from tables that keep the base in row 0."""
    spans: tuple[Span, ...] = ()
    """Segments that have a delta, where the host knows them (a captured step serves any)."""
    segments: Segments | None = None
    """The same for the device, those of the base included; None where nobody asks."""
    work: tuple[Work, ...] = ()
    """What the grouped kernels do for the segments that are not ``merged``."""
    merged: tuple[Span, ...] = ()
    """Segments so long that they multiply with the sum of base and delta."""


def join_runs(runs: Sequence[tuple[int, int]]) -> tuple[Span, ...]:
    """Spans of all slots from ``(slot, rows)`` runs in batch order; runs of one slot are neighbours and are joined."""
    spans: list[Span] = []
    end = 0
    for slot, length in runs:
        start, end = end, end + length
        if spans and spans[-1].slot == slot:
            start = spans.pop().start
        spans.append(Span(slot, start, end))
    return tuple(spans)


def send(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers to the device, without waiting for what it has yet to do."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def send_segments(spans: Sequence[Span], device: torch.device) -> Segments:
    """The table of segments for kernels; ``spans`` cover all rows."""
    starts = [0, *(span.stop for span in spans)]
    return Segments(send(starts, torch.int32, device), send([span.slot for span in spans], torch.int32, device))


def send_index(spans: Sequence[Span], device: torch.device) -> torch.Tensor:
    """``[rows]`` int32, slot + 1 of every row."""
    index: list[int] = []
    for span in spans:
        index.extend([span.slot + 1] * (span.stop - span.start))
    return send(index, torch.int32, device)
