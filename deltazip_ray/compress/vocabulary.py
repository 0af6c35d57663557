"""Softmaxes over a vocabulary that is looked at a piece at a time: neither a head nor its logits are ever whole."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

ROWS = 8192
"""Tokens of the vocabulary in one piece: a multiple of a tile's rows."""
TOKENS = 1024
"""Positions whose logits are held at once."""
Pieces = Callable[[], Iterator[Tensor]]
"""Gives the rows ``[≤ ROWS, hidden]`` of a head, piece after piece, each time from the first."""


def row_pieces(rows: int) -> Iterator[slice]:
    """Slices of at most ROWS out of so many rows."""
    return (slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))


class Divergence:
    """KL between the softmaxes of two models, to which pieces of their heads are shown one after the other.

    Sums of float32 logits are kept in float64: the divergences of interest are smaller than the rounding of float32.
    """

    def __init__(self, tokens: int, device: torch.device, softcap: float | None = None) -> None:
        self._softcap = softcap
        self._ours = torch.full((tokens,), -torch.inf, dtype=torch.float64, device=device)
        self._theirs = self._ours.clone()
        self._gap = torch.zeros_like(self._ours)

    def add(self, ours: Tensor, our_head: Tensor, theirs: Tensor, their_head: Tensor) -> None:
        """Show the same rows of both heads; the states ``[tokens, hidden]`` are those of all positions, each time."""
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
    """Gradient by ``states`` ``[tokens, hidden]`` of the log-likelihood of tokens drawn from the model's predictions.

    The head is gone through twice: a token is the one with the largest sum of logit and Gumbel noise; the gradient of
    its log-likelihood is its row of the head minus the mean row under the softmax.
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
    """Softly, where a model does that."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _tokens(states: Tensor, rows: Tensor, softcap: float | None) -> Iterator[tuple[slice, Tensor]]:
    """Logits of some positions at a time."""
    for start in range(0, len(states), TOKENS):
        at = slice(start, start + TOKENS)
        yield at, logits(states[at], rows, softcap)
