"""Samples the tokens of one step from its logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltazip_kernels.pick import pick, pick_reference
from deltazip_ray.engine.fetched import Fetched
from deltazip_ray.engine.sampling.draw import Draw
from deltazip_ray.engine.sampling.edits import Edit, edits
from deltazip_ray.engine.sampling.logprobs import LogprobRows
from deltazip_ray.engine.sampling.random_rows import RandomRows
from deltazip_ray.scheduler.batch import Batch, Drawn
from deltazip_ray.scheduler.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Everything that :func:`sample` needs besides logits, on the device. Empty for a greedy batch."""

    edits: tuple[Edit, ...] = ()
    random: RandomRows | None = None
    logprobs: LogprobRows | None = None

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> "SamplingBatch":
        """Stage draws, in the order of the logits' rows, without waiting for the device."""
        return cls(edits(draws, device), RandomRows.of(draws, device), LogprobRows.of(draws, device))


class StepDraws:
    """Stages the draws of steps. While the set of requests stays the same, only the random numbers change."""

    def __init__(self, device: torch.device) -> None:
        """``device`` of the logits."""
        self._device = device
        self._random: RandomRows | None = None
        self._drawing: Sequence[object] | None = None
        """The sequences of ``_random``, if they need neither edits nor logprobs."""

    def stage(self, batch: Batch) -> SamplingBatch:
        """Stage the draws of a batch, without waiting for the device."""
        chunks = batch.sampling_chunks
        drawing = [chunk.sequence for chunk in chunks]
        if self._random is not None and drawing == self._drawing:
            positions = np.array([chunk.output_index for chunk in chunks])
            return SamplingBatch(random=self._random.at(positions))
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
    """``[rows]`` int64; -1 for rows whose logits are not finite."""
    fetched: Fetched
    """The tokens, and log-probabilities of the rows in ``wanted``."""
    wanted: tuple[tuple[int, int], ...] = ()

    def fetch(self) -> Drawn:
        """Waits for the samples, but for nothing after them."""
        tokens, *logprobs = self.fetched.wait()
        told = {
            row: TokenLogprobs(chosen[0], tuple(zip(ids[:count], best[:count], strict=True)))
            for (row, count), chosen, best, ids in zip(self.wanted, *logprobs, strict=True)
        }
        return Drawn(tokens, told)


def sample(logits: torch.Tensor, batch: SamplingBatch, best: torch.Tensor | None = None) -> SampledTokens:
    """One token for each row of ``logits`` ``[rows, vocab]``, which are -inf for impossible tokens.

    ``best``: what ``pick`` finds for ``logits`` alone, if that is known. May overwrite ``logits``. Does not wait for
    the device.
    """
    asked, random = batch.logprobs, batch.random
    logprobs = None if asked is None else asked.of_all(logits)
    if batch.edits:
        logits = logits.float()
    for edit in batch.edits:
        edit.apply(logits)
    draw = pick if logits.is_cuda else pick_reference
    if random is not None:
        tokens = draw(logits, random.numbers, random.points)
    else:
        tokens = draw(logits) if best is None else best
    if asked is None or logprobs is None:
        return SampledTokens(tokens, Fetched(tokens))
    return SampledTokens(tokens, Fetched(tokens, *asked.select(logprobs, tokens.clamp(min=0))), asked.wanted)
