"""Probabilities as whole numbers: their sums are exact in any order, so samples do not depend on a batch's shape.

Weights are ``[rows, vocab]`` in float32. Sums are float64 and exact, as 2**19 weights of at most 2**34 stay below
2**53.
"""

import torch
import torch.nn.functional as F

from deltazip_kernels.cut import least_kept

_BEST = 2.0**34  # weight of a row's likeliest token; tokens less than 2**-34 times as likely are never sampled
_CHUNK = 128  # divides the vocabularies of common models, which then need no padding


def whole_weights(logits: torch.Tensor, top: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Scaled probabilities, rounded down. Overwrites ``logits``; ``top`` and ``temperature`` are ``[rows, 1]``."""
    # The maximum is subtracted first, so that no temperature overflows.
    return logits.sub_(top).div_(temperature).exp_().mul_(_BEST).floor_()


def cut_ranks(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The lowest weight ``[rows, 1]`` that is kept by top-k and then by top-p of the rest.

    ``top_k`` (infinite: all) and ``top_p`` are ``[rows, 1]`` float64.
    """
    return least_kept(weights, top_k, top_p) if weights.is_cuda else cut_sorted(weights, top_k, top_p)


def cut_sorted(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The reference of :func:`cut_ranks`.

    Of equally likely tokens, top-k counts as many as it has room for; :func:`keep` then keeps all of them.
    """
    best = weights.sort(dim=-1, descending=True).values
    best = best.where(torch.arange(best.shape[1], device=best.device) < top_k, 0.0)
    reached = best.cumsum(dim=-1, dtype=torch.float64)
    kept = (reached - best < top_p * reached[:, -1:]).sum(dim=-1, keepdim=True)
    return best.gather(1, (kept - 1).clamp(min=0))


def cut_probability(min_p: torch.Tensor) -> torch.Tensor:
    """The weight of a token that is ``min_p`` times as likely as the likeliest one."""
    return (min_p * _BEST).float()


def keep(weights: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """``weights``, with those below ``least`` ``[rows, 1]`` set to 0. Equally likely tokens are treated alike."""
    return weights.where(weights >= least, 0.0)


def pick(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Sample tokens ``[rows]`` in proportion to their weights, at ``points`` ``[rows, 1]`` of the cumulative sum.

    A 48-bit point in [0, 1) times the sum stays below the sum in float64. Chunks are summed first, so that only one
    chunk of each row needs a cumulative sum.
    """
    rows, vocab = weights.shape
    if vocab % _CHUNK:
        weights = F.pad(weights, (0, -vocab % _CHUNK))
    chunks = weights.view(rows, -1, _CHUNK)
    ends = chunks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    goal = points * ends[:, -1:]
    at = torch.searchsorted(ends, goal, right=True).clamp(max=ends.shape[1] - 1)
    chunk = chunks.gather(1, at[:, :, None].expand(-1, -1, _CHUNK))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    within = torch.searchsorted(chunk, goal - F.pad(ends, (1, 0)).gather(1, at), right=True)
    # Out of range only if the row is not finite, and then the result is not used.
    return (at * _CHUNK + within)[:, 0].clamp(max=vocab - 1)
