"""Which rows of a flat batch belong to which version."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltazip_kernels import Segments

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

    spans: tuple[Span, ...]
    """Segments that have a delta: those of the base are left out."""
    segments: Segments
    """All segments, as the kernels take them."""
    index: torch.Tensor
    """``[rows]`` int64, slot + 1: picks from tables that keep the base in row 0."""


def make_rows(runs: Sequence[tuple[int, int]], device: torch.device) -> Rows:
    """Rows from ``(slot, rows)`` runs in batch order; runs of one slot must be neighbours and are joined."""
    joined: list[list[int]] = []
    for slot, length in runs:
        if joined and joined[-1][0] == slot:
            joined[-1][1] += length
        else:
            joined.append([slot, length])
    starts, spans = [0], []
    for slot, length in joined:
        starts.append(starts[-1] + length)
        if slot != BASE_SLOT:
            spans.append(Span(slot, starts[-2], starts[-1]))
    slots = torch.tensor([slot for slot, _ in joined], dtype=torch.int32)
    lengths = torch.tensor([length for _, length in joined], dtype=torch.int64)
    index = torch.repeat_interleave(slots.long() + 1, lengths)
    segments = Segments(torch.tensor(starts, dtype=torch.int32).to(device), slots.to(device))
    return Rows(tuple(spans), segments, index.to(device))
