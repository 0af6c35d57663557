"""Log-probabilities of the model's own logits, before biases, penalties, masks and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltazip_ray.engine.sampling.draw import Draw
from deltazip_ray.layers.staging import to_device

_LEAST = -9999.0  # JSON has no -inf; OpenAI's API writes this


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """The rows whose log-probabilities are requested."""

    rows: torch.Tensor
    wanted: tuple[tuple[int, int], ...]
    """(row of the batch, number of likeliest tokens)."""

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> "LogprobRows | None":
        """None if no row needs them."""
        wanted = [(row, one.params.logprobs) for row, one in enumerate(draws) if one.params.logprobs is not None]
        if not wanted:
            return None
        return cls(to_device(np.array([row for row, _ in wanted]), device), tuple(wanted))

    def of_all(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``[rows, vocab]`` of these rows of ``logits`` ``[batch, vocab]``."""
        return logprobs_of(logits.index_select(0, self.rows).float())

    def select(self, logprobs: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The log-probabilities ``[rows, 1]`` of the sampled ``tokens`` ``[batch]``, and the best with their tokens."""
        return select(logprobs, tokens.index_select(0, self.rows), max(count for _, count in self.wanted))


def logprobs_of(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ``logits`` ``[rows, vocab]``, float32."""
    return logits.log_softmax(dim=-1).clamp_(min=_LEAST)


def select(logprobs: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The elements ``[rows, 1]`` of ``logprobs`` ``[rows, vocab]`` at ``tokens`` ``[rows]``, and the ``count`` best (or
    all, if there are fewer) with their tokens."""
    best = logprobs.topk(min(count, logprobs.shape[1]))
    return logprobs.gather(1, tokens[:, None]), best.values, best.indices
