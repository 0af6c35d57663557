"""The rows of one step, from logits to tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Everything that :func:`sample` needs beside logits, on the device. Empty for a batch that is greedy."""

    edits: tuple[Edit, ...]
    random: tuple[RandomRows, ...]
    logprobs: LogprobRows | None

    @classmethod
    def of_step(cls, batch: Batch, device: torch.device) -> "SamplingBatch":
        """Stage the draws of a step; waits for nothing."""
        chunks = batch.sampling_chunks
        if all(chunk.sequence.plain for chunk in chunks):
            return cls((), (), None)
        return cls.of([Draw.of(chunk) for chunk in chunks], device)

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> "SamplingBatch":
        """Stage draws, in the order of the logits' rows; waits for nothing."""
        return cls(edits(draws, device), random_rows(draws, device), LogprobRows.of(draws, device))


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Drawn tokens on the device, and on their way to the host."""

    tokens: torch.Tensor
    """``[rows]`` int64; anything where a row is not finite."""
    finite: torch.Tensor
    """``[rows]`` bool: False where the logits were not, and the model is broken."""
    fetched: Fetched
    wanted: tuple[tuple[int, int], ...] = ()

    def fetch(self) -> list[Drawn | None]:
        """One for each row, None where it is not finite. Waits until they are drawn, and for nothing after that."""
        tokens, finite, *logprobs = self.fetched.wait()
        drawn: list[Drawn | None] = list(map(Drawn, tokens))
        for (row, count), chosen, best, ids in zip(self.wanted, *logprobs, strict=True):
            likeliest = tuple(zip(ids[:count], best[:count], strict=True))
            drawn[row] = Drawn(tokens[row], TokenLogprobs(chosen[0], likeliest))
        if all(finite):
            return drawn
        return [one if ok else None for one, ok in zip(drawn, finite, strict=True)]


def sample(logits: torch.Tensor, batch: SamplingBatch) -> SampledTokens:
    """One token for each row of ``logits`` ``[rows, vocab]``, -inf where a token cannot be.

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
    finite = top.isfinite()
    if asked is None or logprobs is None:
        return SampledTokens(tokens, finite, Fetched(tokens, finite))
    return SampledTokens(tokens, finite, Fetched(tokens, finite, *asked.select(logprobs, tokens)), asked.wanted)
