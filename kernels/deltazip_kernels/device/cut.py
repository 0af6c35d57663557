"""Where top-k and top-p cut a row of weights: the kernel behind ``deltazip_kernels.cut``."""

import triton
import triton.language as tl

_NONE = tl.constexpr(0x3F7FFFFF)  # bits of a float32 below 1, the least weight that is not 0
_BEST = tl.constexpr(0x50800000)  # of 2**34, the greatest


@triton.jit
def _above(row, vocab, one, two, three, COUNT: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """The sum, or with COUNT the number, of the weights whose bits are above each of three bounds; all float64."""
    first = tl.zeros((BLOCK,), dtype=tl.float64)
    second = tl.zeros((BLOCK,), dtype=tl.float64)
    third = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, vocab, BLOCK * UNROLL):
        for i in tl.static_range(0, UNROLL):
            at = start + i * BLOCK + tl.arange(0, BLOCK)
            weights = tl.load(row + at, mask=at < vocab, other=0.0)
            bits = weights.to(tl.int32, bitcast=True)
            value = weights.to(tl.float64)
            if COUNT:
                value = tl.full((BLOCK,), 1.0, dtype=tl.float64)
            first += tl.where(bits > one, value, 0.0)
            second += tl.where(bits > two, value, 0.0)
            third += tl.where(bits > three, value, 0.0)
    return tl.sum(first), tl.sum(second), tl.sum(third)


@triton.jit
def _search(row, vocab, low, high, goal, COUNT: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """The least bits in ``(low, high]`` above which there is less than ``goal``; that is so above ``high``."""
    while high - low > 1:
        width = high - low
        one = low + tl.maximum(width // 4, 1)
        two = low + tl.maximum(width // 2, 1)
        three = high - width // 4
        first, second, third = _above(row, vocab, one, two, three, COUNT, BLOCK, UNROLL)
        low = tl.where(first < goal, low, tl.where(second < goal, one, tl.where(third < goal, two, three)))
        high = tl.where(first < goal, one, tl.where(second < goal, two, tl.where(third < goal, three, high)))
    return high


@triton.jit
def cut(weights, stride, vocab, top_k, top_p, least, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """One program a row."""
    t = tl.program_id(0).to(tl.int64)
    row = weights + t * stride
    k, p = tl.load(top_k + t), tl.load(top_p + t)
    low = tl.full((), _NONE, dtype=tl.int32)
    best = tl.full((), _BEST, dtype=tl.int32)
    whole, _, _ = _above(row, vocab, low, low, low, False, BLOCK, UNROLL)
    if k < vocab:
        last = _search(row, vocab, low, best, k, True, BLOCK, UNROLL)
        number, _, _ = _above(row, vocab, last, last, last, True, BLOCK, UNROLL)
        better, _, _ = _above(row, vocab, last, last, last, False, BLOCK, UNROLL)
        value = last.to(tl.float32, bitcast=True).to(tl.float64)
        # Of those that weigh as much as the last one only so many count as k leaves room for.
        whole = tl.minimum(whole, better + (k - number) * value)
        low = last - 1
    found = _search(row, vocab, low, best, p * whole, False, BLOCK, UNROLL)
    tl.store(least + t, found.to(tl.float32, bitcast=True))
