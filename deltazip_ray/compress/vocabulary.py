"""Softmaxes over a vocabulary, computed piece by piece: neither a head nor its logits are ever in memory as a whole."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

ROWS = 8192
"""Rows of the vocabulary in one piece: a multiple of a tile's rows."""
TOKENS = 1024
"""Positions whose logits are in memory at once."""
Pieces = Callable[[], Iterator[Tensor]]
"""Returns a new iterator over the pieces ``[≤ ROWS, hidden]`` of a head."""


def row_pieces(rows: int) -> Iterator[slice]:
    """Slices of at most ROWS that cover ``rows`` rows."""
    return (slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))


class Divergence:
    """KL between the softmaxes of two models, accumulated over pieces of their heads.

    Sums are kept in float64: the divergences of interest are smaller than the rounding errors of float32.
    """

    def __init__(self, tokens: int, device: torch.device, softcap: float | None = None) -> None:
        self._softcap = softcap
        self._ours = torch.full((tokens,), -torch.inf, dtype=torch.float64, device=device)
        self._theirs = self._ours.clone()
        self._gap = torch.zeros_like(self._ours)

    def add(self, ours: Tensor, our_head: Tensor, theirs: Tensor, their_head: Tensor) -> None:
        """Add the same rows of both heads; the states ``[tokens, hidden]`` are always those of all positions."""
        for at in torch.split(torch.arange(len(ours)), TOKENS):
            rows = slice(int(at[0]), int(at[-1]) + 1)
            mine = logits(ours[rows], our_head, self._softcap).double()
            other = logits(theirs[rows], their_head, self._softcap).double()
            before = self._ours[rows].clone()
            total = torch.logaddexp(before, mine.logsumexp(1), out=self._ours[rows])
            gap = ((mine - total[:, None]).exp_() * (mine - other)).sum(1)
            self._gap[rows].mul_((before - total).exp()).add_(gap)
            torch.logaddexp(self._theirs[rows], other.logsumexp(1), out=self._theirs[rows])

    @property
    def totals(self) -> tuple[Tensor, Tensor]:
        """Log denominators of both softmaxes, float64 ``[tokens]``."""
        return self._ours, self._theirs

    def mean(self) -> float:
        """KL(ours ‖ theirs) per position, in nats."""
        return max(float((self._gap - self._ours + self._theirs).mean()), 0.0)


def sampled_slopes(states: Tensor, head: Pieces, generator: torch.Generator, softcap: float | None) -> Tensor:
    """Gradient of the log-likelihood of tokens sampled from the predictions of ``states`` ``[tokens, hidden]``.

    Goes through the head twice. First it samples each token as the largest sum of logit and Gumbel noise. Then it
    computes the gradient: the token's row of the head minus the mean row under the softmax.
    """
    total = torch.full((len(states),), -torch.inf, device=states.device)
    best, drawn = total.clone(), torch.zeros_like(total, dtype=torch.int64)
    first = 0
    for rows in head():
        for at, found in _tokens(states, rows, softcap):
            total[at] = torch.logaddexp(total[at], found.logsumexp(1))
            noise = torch.empty_like(found).exponential_(generator=generator).log_()
            highest, where = (found - noise).max(1)
            drawn[at] = torch.where(highest > best[at], where + first, drawn[at])
            best[at] = torch.maximum(best[at], highest)
        first += len(rows)
    slopes = torch.zeros(states.shape, device=states.device)
    first = 0
    for rows in head():
        for at, found in _tokens(states, rows, softcap):
            weights = (found - total[at, None]).exp_().neg_()
            here = (drawn[at] >= first) & (drawn[at] < first + len(rows))
            weights[here, drawn[at][here] - first] += 1
            if softcap is not None:
                weights *= 1 - (found / softcap).square()
            slopes[at] += weights.to(rows.dtype) @ rows
        first += len(rows)
    return slopes.to(states.dtype)


def logits(states: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """Float32 ``[tokens, rows of the head]`` of final states ``[tokens, hidden]``."""
    return capped(linear(states, head).float(), softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Apply the model's soft cap, if it has one."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _tokens(states: Tensor, rows: Tensor, softcap: float | None) -> Iterator[tuple[slice, Tensor]]:
    """Logits, for TOKENS positions at a time."""
    for start in range(0, len(states), TOKENS):
        at = slice(start, start + TOKENS)
        yield at, logits(states[at], rows, softcap)
