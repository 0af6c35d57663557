"""Samples the tokens of one step from its logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltazip_ray.engine.sampling.draw import Draw
from deltazip_ray.engine.sampling.edits import Edit, edits
from deltazip_ray.engine.sampling.logprobs import LogprobRows
from deltazip_ray.engine.sampling.random_rows import RandomRows, random_rows
from deltazip_ray.engine.staging import Fetched
from deltazip_ray.scheduler.batch import Batch, Drawn
from deltazip_ray.scheduler.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Everything that :func:`sample` needs besides logits, on the device. Empty for a greedy batch."""

    edits: tuple[Edit, ...] = ()
    random: tuple[RandomRows, ...] = ()
    logprobs: LogprobRows | None = None

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> "SamplingBatch":
        """Stage draws, in the order of the logits' rows, without waiting for the device."""
        return cls(edits(draws, device), random_rows(draws, device), LogprobRows.of(draws, device))


class StepDraws:
    """Stages the draws of steps. While the set of requests stays the same, only the random numbers change."""

    def __init__(self, device: torch.device) -> None:
        """``device`` of the logits."""
        self._device = device
        self._random: tuple[RandomRows, ...] = ()
        self._drawing: Sequence[object] | None = None
        """The sequences of ``_random``, if they need neither edits nor logprobs."""

    def stage(self, batch: Batch) -> SamplingBatch:
        """Stage the draws of a batch, without waiting for the device."""
        chunks = batch.sampling_chunks
        drawing = [chunk.sequence for chunk in chunks]
        if drawing == self._drawing:
            positions = np.array([chunk.output_index for chunk in chunks])
            return SamplingBatch(random=tuple(rows.at(positions) for rows in self._random))
        if all(sequence.plain for sequence in drawing):
            return SamplingBatch()
        staged = SamplingBatch.of([Draw.of(chunk) for chunk in chunks], self._device)
        self._random = staged.random
        self._drawing = None if staged.edits or staged.logprobs else drawing
        return staged


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Sampled tokens, on the device and being copied to the host."""

    tokens: torch.Tensor
    """``[rows]`` int64; undefined for rows whose logits are not finite."""
    fetched: Fetched
    """The tokens, the highest logit of each row, and log-probabilities of the rows in ``wanted``."""
    wanted: tuple[tuple[int, int], ...] = ()

    def fetch(self) -> list[Drawn | None]:
        """One per row, None if its logits are not finite. Waits for the samples, but for nothing after them."""
        tokens, top, *logprobs = self.fetched.wait()
        drawn: list[Drawn | None] = list(map(Drawn, tokens))
        for (row, count), chosen, best, ids in zip(self.wanted, *logprobs, strict=True):
            likeliest = tuple(zip(ids[:count], best[:count], strict=True))
            drawn[row] = Drawn(tokens[row], TokenLogprobs(chosen[0], likeliest))
        if all(map(math.isfinite, top)):
            return drawn
        return [one if math.isfinite(best) else None for one, best in zip(drawn, top, strict=True)]


def sample(logits: torch.Tensor, batch: SamplingBatch) -> SampledTokens:
    """One token for each row of ``logits`` ``[rows, vocab]``, which are -inf for impossible tokens.

    May overwrite ``logits``. Does not wait for the device.
    """
    if batch.edits or batch.random or batch.logprobs:
        logits = logits.float()
    asked = batch.logprobs
    logprobs = None if asked is None else asked.of_all(logits)
    for edit in batch.edits:
        edit.apply(logits)
    top, tokens = logits.max(dim=-1)
    for rows in batch.random:
        tokens.index_copy_(0, rows.rows, rows.draw(logits, top))
    if asked is None or logprobs is None:
        return SampledTokens(tokens, Fetched(tokens, top))
    return SampledTokens(tokens, Fetched(tokens, top, *asked.select(logprobs, tokens)), asked.wanted)
