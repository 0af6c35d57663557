"""Drawing tokens. What a row draws depends on its logits, its parameters and its output position, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltazip_ray.scheduler.request import SamplingParams

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to draw: the parameters of its request and its position in the request's whole output."""

    params: SamplingParams
    position: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of both arguments (splitmix64, 48 bits kept).

    48 bits, so that it times a sum in float64 stays below the sum.
    """
    return (_mix(_mix(seed) + (position + 1) * _GOLDEN) >> 16) * 2.0**-48


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """One token for each row of ``logits`` ``[rows, vocab]``, float32, -inf where a token cannot be.

    None for a row whose logits are not finite: its model is broken, other rows are not.
    """
    top, greedy = logits.max(dim=-1)
    # Each row is computed as if alone: whether it is filtered depends on its own parameters only.
    plain = [i for i, draw in enumerate(draws) if draw.params.temperature > 0 and not _filtered(draw.params)]
    filtered = [i for i, draw in enumerate(draws) if draw.params.temperature > 0 and _filtered(draw.params)]
    if plain:
        greedy[plain] = _draw(_weights(logits, top, plain, draws), plain, draws)
    if filtered:
        weights, order = _weights(logits, top, filtered, draws).sort(dim=-1, descending=True, stable=True)
        ranks = _draw(_filter(weights, filtered, draws), filtered, draws)
        greedy[filtered] = order.gather(1, ranks[:, None])[:, 0]
    finite = top.isfinite().tolist()
    return [token if ok else None for token, ok in zip(greedy.tolist(), finite, strict=True)]


def _filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _weights(logits: torch.Tensor, top: torch.Tensor, rows: list[int], draws: Sequence[Draw]) -> torch.Tensor:
    """Probabilities up to a factor, ``[rows, vocab]`` float64: 1 for a row's best token."""
    temperature = _column([draws[i].params.temperature for i in rows], logits)
    # The best logit is taken off first, so that no temperature overflows.
    return ((logits[rows] - top[rows, None]).double() / temperature).exp()


def _filter(weights: torch.Tensor, rows: list[int], draws: Sequence[Draw]) -> torch.Tensor:
    """Zero what top-k, and then top-p of the rest, leave out; ``weights`` descend in each row."""
    vocab = weights.shape[1]
    top_k = _column([draws[i].params.top_k or vocab for i in rows], weights)
    top_p = _column([draws[i].params.top_p for i in rows], weights)
    weights = weights.where(torch.arange(vocab, device=weights.device) < top_k, 0.0)
    cumulative = weights.cumsum(dim=-1)
    return weights.where(cumulative - weights < top_p * cumulative[:, -1:], 0.0)


def _draw(weights: torch.Tensor, rows: list[int], draws: Sequence[Draw]) -> torch.Tensor:
    """Indices ``[rows]`` drawn in proportion to ``weights``, by inversion of the cumulative sum."""
    cumulative = weights.cumsum(dim=-1)
    points = _column([uniform(draws[i].params.seed, draws[i].position) for i in rows], weights)
    found = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)[:, 0]
    # Out of range only where the row is not finite, and then nobody looks at it.
    return found.clamp(max=weights.shape[1] - 1)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _mix(value: int) -> int:
    """The finalizer of splitmix64."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
