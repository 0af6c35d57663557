"""Where top-k and top-p cut a row, without sorting: the least logit that they keep, by bisection.

Logits are compared as whole numbers of the same order, of so many bits as their type has, and sums of weights are
exact. What is kept is therefore what sorting would keep, for some 8 passes over a row of bfloat16 instead of a sort.
"""

import triton
import triton.language as tl

from deltazip_kernels.device.weights import load_logits, weights_of

_LEAST = tl.constexpr(25.0)  # exp(-25) is less than half of 2**-34, the least weight that is not 0


@triton.jit
def _order(logits, SHIFT: tl.constexpr):
    """Whole numbers in the order of ``logits`` (float32), of which SHIFT bits say nothing."""
    bits = logits.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _logit(order, SHIFT: tl.constexpr):
    """The inverse of :func:`_order`, of one int64."""
    bits = (order << SHIFT).to(tl.int32) ^ (tl.where(order < 0, 0x7FFFFFFF, 0) >> SHIFT << SHIFT)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _add(sums, logits, top, temperature, one, two, three, COUNT: tl.constexpr, SHIFT: tl.constexpr):
    """``sums`` with what :func:`_above` adds for these logits."""
    order = _order(logits, SHIFT)
    if COUNT:
        values = tl.full(logits.shape, 1, dtype=tl.int32)
    else:
        values = weights_of(logits, top, temperature).to(tl.float64)
    first, second, third = sums
    first += tl.where(order > one, values, 0)
    second += tl.where(order > two, values, 0)
    third += tl.where(order > three, values, 0)
    return first, second, third


@triton.jit
def _above(
    row, vocab, top, temperature, one, two, three, COUNT: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of weights, or with COUNT the number, of the logits above each of three bounds, float64."""
    kind: tl.constexpr = tl.int32 if COUNT else tl.float64
    sums = tl.zeros((BLOCK,), dtype=kind), tl.zeros((BLOCK,), dtype=kind), tl.zeros((BLOCK,), dtype=kind)
    one, two, three = one.to(tl.int32), two.to(tl.int32), three.to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, loop_unroll_factor=4):
        logits = load_logits(row, start + lanes, vocab, MASKED=False)
        sums = _add(sums, logits, top, temperature, one, two, three, COUNT, SHIFT)
    for start in range(whole, vocab, BLOCK):
        logits = load_logits(row, start + lanes, vocab, MASKED=True)
        sums = _add(sums, logits, top, temperature, one, two, three, COUNT, SHIFT)
    first, second, third = sums
    return tl.sum(first).to(tl.float64), tl.sum(second).to(tl.float64), tl.sum(third).to(tl.float64)


@triton.jit
def _search(
    row, vocab, top, temperature, low, high, goal, COUNT: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The least in ``(low, high]`` above which there is less than ``goal``; that is so above ``high``."""
    while high - low > 1:
        width = high - low
        one = low + tl.maximum(width // 4, 1)
        two = low + tl.maximum(width // 2, 1)
        three = high - width // 4
        first, second, third = _above(row, vocab, top, temperature, one, two, three, COUNT, SHIFT, BLOCK)
        low = tl.where(first < goal, low, tl.where(second < goal, one, tl.where(third < goal, two, three)))
        high = tl.where(first < goal, one, tl.where(second < goal, two, tl.where(third < goal, three, high)))
    return high


@triton.jit
def cut(row, vocab, top, temperature, top_k, top_p, BLOCK: tl.constexpr):
    """The least weight of a row that top-k, and then top-p of the rest, keep."""
    SHIFT: tl.constexpr = 16 if row.dtype.element_ty == tl.bfloat16 else 0
    best = _order(top, SHIFT).to(tl.int64)
    low = _order(top - _LEAST * temperature, SHIFT).to(tl.int64) - 1
    whole, _, _ = _above(row, vocab, top, temperature, low, low, low, False, SHIFT, BLOCK)
    if top_k < vocab:
        last = _search(row, vocab, top, temperature, low, best, top_k, True, SHIFT, BLOCK)
        number, _, _ = _above(row, vocab, top, temperature, last, last, last, True, SHIFT, BLOCK)
        better, _, _ = _above(row, vocab, top, temperature, last, last, last, False, SHIFT, BLOCK)
        value = weights_of(_logit(last, SHIFT), top, temperature).to(tl.float64)
        # Of those that weigh as much as the last one only so many count as k leaves room for.
        whole = tl.minimum(whole, better + (top_k - number) * value)
        low = last - 1
    found = _search(row, vocab, top, temperature, low, best, top_p * whole, False, SHIFT, BLOCK)
    return weights_of(_logit(found, SHIFT), top, temperature)
