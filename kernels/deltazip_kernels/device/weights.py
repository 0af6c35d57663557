"""Probabilities as whole numbers, whose sums in float64 are the same in any order (``deltazip_kernels.pick``)."""

import triton
import triton.language as tl

_BEST = tl.constexpr(17179869184.0)
_WHOLE = tl.constexpr(8388608.0)  # the float32 from which on there are no fractions
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_logits(row, tokens, vocab, MASKED: tl.constexpr):
    """Logits of ``tokens`` in float32; with MASKED -inf beyond the vocabulary."""
    if MASKED:
        return tl.load(row + tokens, mask=tokens < vocab, other=-float("inf")).to(tl.float32)
    return tl.load(row + tokens).to(tl.float32)


@triton.jit
def weights_of(logits, top, temperature):
    """Weights: 2**34 for the row's best logit ``top``."""
    # The maximum is subtracted first, so that no temperature overflows.
    return (tl.exp2((logits - top) * (_LOG2E / temperature)) * _BEST + _WHOLE) - _WHOLE


@triton.jit
def min_p_weight(min_p):
    """The weight of a token that is ``min_p`` (float64) times as likely as the best."""
    return (min_p * _BEST).to(tl.float32)
