"""Log-probabilities of prompt tokens, from the logits of the positions before them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter

import numpy as np
import torch

from deltazip_ray.engine.fetched import Fetched
from deltazip_ray.engine.sampling.logprobs import logprobs_of, select
from deltazip_ray.layers.staging import to_device
from deltazip_ray.scheduler.batch import Batch, Scores
from deltazip_ray.scheduler.request import TokenLogprobs

_PIECE = 256
"""Rows whose logits are in memory at once: 0.3 GB for a vocabulary of 128,000."""

RowLogits = Callable[[Sequence[int], Sequence[tuple[int, int]]], torch.Tensor]
"""Computes logits ``[rows, vocab]``, float32, of rows of a step, given also as ``(slot, rows)`` runs."""

_Row = tuple[int, int, int, int]
"""(row of the step, its slot, the next token, number of likeliest tokens)."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The prompt log-probabilities of a step, being copied to the host."""

    pieces: tuple[Fetched, ...]
    lengths: tuple[int, ...]
    """Rows of each scoring chunk."""
    wanted: tuple[int, ...]
    """Number of likeliest tokens for each scoring chunk."""

    @classmethod
    def of(cls, batch: Batch, logits: RowLogits, most: int) -> "PromptScores":
        """Compute them in pieces of at most ``most`` rows, without waiting for the device."""
        chunks = batch.scoring_chunks
        rows = _rows(batch)
        pieces = []
        while piece := list(islice(rows, min(most, _PIECE))):
            pieces.append(_score(piece, logits))
        return cls(
            tuple(pieces),
            tuple([len(chunk.scored) for chunk in chunks]),
            tuple([chunk.sampling.prompt_logprobs or 0 for chunk in chunks]),
        )

    def fetch(self) -> list[Scores]:
        """The results of each scoring chunk. Waits until they are computed."""
        found = _told(self.pieces)
        return [
            _finite(list(islice(found, length)), count) for length, count in zip(self.lengths, self.wanted, strict=True)
        ]


def _rows(batch: Batch) -> Iterator[_Row]:
    start = 0
    for chunk in batch.chunks:
        for position, target in zip(chunk.scored, chunk.targets, strict=True):
            yield start + position - chunk.start, chunk.slot, target, chunk.sampling.prompt_logprobs or 0
        start += len(chunk.tokens)


def _score(piece: Sequence[_Row], logits: RowLogits) -> Fetched:
    runs = [(slot, len(list(rows))) for slot, rows in groupby(piece, key=itemgetter(1))]
    logprobs = logprobs_of(logits([row for row, *_ in piece], runs))
    targets = to_device(np.array([target for _, _, target, _ in piece]), logprobs.device)
    chosen, best, tokens = select(logprobs, targets, max(count for *_, count in piece))
    return Fetched(chosen[:, 0], (logprobs > chosen).sum(dim=-1), best, tokens)


def _told(pieces: Iterable[Fetched]) -> Iterator[TokenLogprobs]:
    for piece in pieces:
        for chosen, better, best, tokens in zip(*piece.wait(), strict=True):
            yield TokenLogprobs(chosen, tuple(zip(tokens, best, strict=True)), better + 1)


def _finite(told: Sequence[TokenLogprobs], count: int) -> Scores:
    if not all(math.isfinite(one.chosen) for one in told):
        return None
    return [TokenLogprobs(one.chosen, one.best[:count], one.rank) for one in told]
