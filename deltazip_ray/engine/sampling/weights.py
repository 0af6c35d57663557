"""Probabilities as whole numbers: sums do not depend on the order of adding, so draws do not depend on a batch's shape.

All work is ``[rows, vocab]`` in float32; sums of it are float64 and exact, since 2**19 weights of at most 2**34 stay
below 2**53.
"""

import torch
import torch.nn.functional as F

from deltazip_kernels.cut import least_kept

_BEST = 2.0**34  # weight of a row's best token; what is less than 2**-34 times as likely never comes
_CHUNK = 128  # divides the vocabularies of common models, so that nothing is padded


def whole_weights(logits: torch.Tensor, top: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Probabilities up to a factor and rounded down. Overwrites ``logits``; ``top``, ``temperature``: ``[rows, 1]``."""
    # The best logit is taken off first, so that no temperature overflows.
    return logits.sub_(top).div_(temperature).exp_().mul_(_BEST).floor_()


def cut_ranks(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The least weight ``[rows, 1]`` that top-k, and then top-p of the rest, keep.

    ``top_k`` (infinite for all) and ``top_p``: ``[rows, 1]`` float64.
    """
    return least_kept(weights, top_k, top_p) if weights.is_cuda else cut_sorted(weights, top_k, top_p)


def cut_sorted(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The meaning of :func:`cut_ranks`.

    Of tokens that are equally likely as many count as ``top_k`` leaves room for; :func:`keep` then keeps all of them.
    """
    best = weights.sort(dim=-1, descending=True).values
    best = best.where(torch.arange(best.shape[1], device=best.device) < top_k, 0.0)
    reached = best.cumsum(dim=-1, dtype=torch.float64)
    kept = (reached - best < top_p * reached[:, -1:]).sum(dim=-1, keepdim=True)
    return best.gather(1, (kept - 1).clamp(min=0))


def cut_probability(min_p: torch.Tensor) -> torch.Tensor:
    """The least weight of a token that is at least ``min_p`` times as likely as the best one."""
    return (min_p * _BEST).float()


def keep(weights: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """``weights`` without those below ``least`` ``[rows, 1]``. Tokens that are equally likely stay or go together."""
    return weights.where(weights >= least, 0.0)


def pick(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Tokens ``[rows]`` in proportion to their weights: where ``points`` ``[rows, 1]`` of the whole sum is passed.

    A point in [0, 1) of 48 bits stays below the sum in float64. Sums of chunks come first, so that only one chunk of a
    row needs a running sum.
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
    # Out of range only where the row is not finite, and then nobody looks at it.
    return (at * _CHUNK + within)[:, 0].clamp(max=vocab - 1)
