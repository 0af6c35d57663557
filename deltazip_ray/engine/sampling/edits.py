"""Modifies logits in place before sampling: biases, penalties and masks, for the rows that need them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deltazip_ray.engine.sampling.draw import Draw
from deltazip_ray.layers.staging import to_device


@dataclass(frozen=True, slots=True)
class Biases:
    """Numbers added to single logits: logit_bias, and -inf for stop tokens before min_tokens."""

    cells: torch.Tensor
    """``[2, N]`` int64: row and token."""
    values: torch.Tensor

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> "Biases | None":
        """None if no row has any."""
        cells = [(row, *bias) for row, one in enumerate(draws) for bias in _biases(one)]
        if not cells:
            return None
        staged = to_device(np.array(cells, dtype=np.float64).T.copy(), device)
        return cls(staged[:2].long(), staged[2].float())

    def apply(self, logits: torch.Tensor) -> None:
        """Add the biases. Stop tokens outside the vocabulary, which a version may have, are ignored."""
        inside = self.cells[1] < logits.shape[1]
        cells = (self.cells[0], self.cells[1].where(inside, 0))
        logits.index_put_(cells, self.values.where(inside, 0.0), accumulate=True)


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of tokens that occurred before."""

    cells: torch.Tensor
    """``[3, N]`` int64: row of the batch, token, and column of ``strengths``."""
    counts: torch.Tensor
    """``[N]``: occurrences of each token in the output."""
    strengths: torch.Tensor
    """``[3, rows]``: repetition, frequency, presence."""

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> "Penalties | None":
        """None when no row has any."""
        rows = [(row, one.params, one.state) for row, one in enumerate(draws) if one.params.penalized and one.state]
        if not rows:
            return None
        lengths = [len(state.tokens) for _, _, state in rows]
        cells = np.empty((4, sum(lengths)), dtype=np.int32)
        cells[0] = np.repeat([row for row, _, _ in rows], lengths)
        cells[1] = np.concatenate([np.frombuffer(state.tokens, dtype=np.int32) for _, _, state in rows])
        cells[2] = np.repeat(np.arange(len(rows)), lengths)
        cells[3] = np.concatenate([np.frombuffer(state.counts, dtype=np.int32) for _, _, state in rows])
        strengths = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for _, p, _ in rows]
        staged = to_device(cells, device).long()
        return cls(staged[:3], staged[3], to_device(np.array(strengths, dtype=np.float32).T.copy(), device))

    def apply(self, logits: torch.Tensor) -> None:
        """Apply the repetition penalty (arXiv 1909.05858), then those of OpenAI's API."""
        row, token, owner = self.cells
        repetition, frequency, presence = self.strengths.index_select(1, owner)
        old = logits[row, token]
        new = torch.where(old > 0, old / repetition, old * repetition)
        new -= frequency * self.counts + presence * (self.counts > 0)
        # Each pair of row and token is unique, so the order of writes does not matter.
        logits.index_put_((row, token), new)


@dataclass(frozen=True, slots=True)
class Masks:
    """Tokens that are allowed next in structured outputs."""

    rows: torch.Tensor
    bits: torch.Tensor
    """``[rows, words]`` int32: bit ``i % 32`` of word ``i // 32`` is 1 if token ``i`` is allowed."""

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> "Masks | None":
        """None if no row is structured."""
        allowed = {row: one.state.matcher.allowed() for row, one in enumerate(draws) if one.state and one.state.matcher}
        if not allowed:
            return None
        bits = np.zeros((len(allowed), max(map(len, allowed.values()))), dtype=np.int32)
        for mask, words in zip(bits, allowed.values(), strict=True):
            mask[: len(words)] = words
        return cls(to_device(np.array(list(allowed)), device), to_device(bits, device))

    def apply(self, logits: torch.Tensor) -> None:
        """Exclude all other tokens, including those beyond the masks."""
        shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
        vocab = logits.shape[1]
        allowed = (self.bits[:, :, None] >> shifts & 1).bool().flatten(1)[:, :vocab]
        allowed = F.pad(allowed, (0, vocab - allowed.shape[1]))
        logits.index_copy_(0, self.rows, logits.index_select(0, self.rows).masked_fill(~allowed, -torch.inf))


Edit = Biases | Penalties | Masks


def edits(draws: Sequence[Draw], device: torch.device) -> tuple[Edit, ...]:
    """The edits that the draws need, in the order of their application."""
    if not any(one.traits.edits for one in draws):
        return ()
    made = (kind.of(draws, device) for kind in (Biases, Penalties, Masks))
    return tuple(edit for edit in made if edit is not None)


def _biases(one: Draw) -> Sequence[tuple[int, float]]:
    params = one.params
    if one.position >= params.min_tokens:
        return params.logit_bias
    return [*params.logit_bias, *((token, -np.inf) for token in params.stop_token_ids)]
