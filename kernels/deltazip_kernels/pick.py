"""Draws one token from each row of logits, in one launch.

A row reads its logits once for the best of them, and once more if it draws at random. Probabilities are whole numbers,
"weights": their sums are exact in any order, so a draw depends on nothing but its own row. They are float32 up to
``2**34``, that of the likeliest token; tokens less than 2**-34 times as likely are never drawn. Sums are float64 and
exact, as 2**19 weights stay below 2**53.
"""

import math

import torch
from torch import Tensor

from deltazip_kernels.device.pick import pick_tokens
from deltazip_kernels.launch import ceil_div, power_of_2

LANES = 4096
"""Weights are added in the order of ``(token % LANES, token // LANES)``."""
_BEST, _WHOLE = 2.0**34, 2.0**23
_WARPS = 16


def pick(logits: Tensor, numbers: Tensor | None = None, points: Tensor | None = None) -> Tensor:
    """One token [rows] int64 for each row of ``logits`` [rows, vocab]; -1 where they are not finite but for -inf.

    ``numbers`` [4, rows] float64: temperature (0 for the best token), top-k (infinite for all), top-p (above 0) of what
    top-k keeps, min-p. ``points`` [rows] float64 in [0, 1), of 48 bits: where in the sum of the weights that are kept
    the token lies. Equally likely tokens are kept alike; top-k counts as many of them as it has room for.
    """
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        most = max(128, power_of_2(ceil_div(vocab, LANES)))
        pick_tokens[(rows,)](
            logits, logits.stride(0), vocab, rows, numbers, points, tokens, BLOCK=LANES, MOST=most, num_warps=_WARPS
        )  # fmt: skip
    return tokens


def pick_reference(logits: Tensor, numbers: Tensor | None = None, points: Tensor | None = None) -> Tensor:
    """:func:`pick` in plain torch, by sorting."""
    top, tokens = logits.max(dim=-1)
    if numbers is not None and points is not None:
        rows = numbers[0].nonzero()[:, 0]
        tokens[rows] = _drawn(logits[rows].float(), top[rows, None], numbers[:, rows, None], points[rows, None])
    return tokens.where(top.isfinite(), -1)


def _drawn(logits: Tensor, top: Tensor, numbers: Tensor, points: Tensor) -> Tensor:
    temperature, top_k, top_p, min_p = numbers
    # The maximum is subtracted first, so that no temperature overflows.
    exponents = logits.sub_(top).mul_(math.log2(math.e) / temperature.float())
    weights = exponents.exp2_().mul_(_BEST).add_(_WHOLE).sub_(_WHOLE)
    least = (min_p * _BEST).float()
    if (top_p < 1).any() or (top_k < weights.shape[1]).any():
        least = torch.maximum(least, _cut(weights, top_k, top_p))
    return _at_points(weights.where(weights >= least, 0.0), points)


def _cut(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least weight [rows, 1] that top-k, and then top-p of the rest, keep."""
    best = weights.sort(dim=-1, descending=True).values
    best = best.where(torch.arange(best.shape[1], device=best.device) < top_k, 0.0)
    reached = best.cumsum(dim=-1, dtype=torch.float64)
    kept = (reached - best < top_p * reached[:, -1:]).sum(dim=-1, keepdim=True)
    return best.gather(1, (kept - 1).clamp(min=0))


def _at_points(weights: Tensor, points: Tensor) -> Tensor:
    """The tokens [rows] at ``points`` [rows, 1] of the cumulative sum."""
    rows, vocab = weights.shape
    lanes = min(vocab, LANES)
    parts = ceil_div(vocab, lanes)
    padded = torch.nn.functional.pad(weights, (0, parts * lanes - vocab))
    ends = padded.view(rows, parts, lanes).transpose(1, 2).flatten(1).cumsum(dim=-1, dtype=torch.float64)
    at = torch.searchsorted(ends, points * ends[:, -1:], right=True)[:, 0]
    # Out of range only if the row is not finite, and then the result is not used.
    return (at % parts * lanes + at // parts).clamp(max=vocab - 1)
