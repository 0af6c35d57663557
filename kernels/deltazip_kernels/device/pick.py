"""Draws tokens from rows of logits: the kernel behind ``deltazip_kernels.pick``, which says what it means."""

import triton
import triton.language as tl

from deltazip_kernels.device.cut import cut
from deltazip_kernels.device.weights import load_logits, min_p_weight, weights_of


@triton.jit
def _better(logits, start, best, place):
    """The larger of ``best`` and ``logits``, inf for what is not a number, and where their blocks start."""
    logits = tl.where(logits == logits, logits, float("inf"))
    return tl.maximum(logits, best), tl.where(logits > best, start, place)


@triton.jit
def _best(row, vocab, BLOCK: tl.constexpr):
    """The largest logit of a row, inf where one is not a number, and the first token that has it."""
    best = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    place = tl.zeros((BLOCK,), dtype=tl.int32)
    lanes = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, loop_unroll_factor=4):
        best, place = _better(load_logits(row, start + lanes, vocab, MASKED=False), start, best, place)
    for start in range(whole, vocab, BLOCK):
        best, place = _better(load_logits(row, start + lanes, vocab, MASKED=True), start, best, place)
    top = tl.max(best)
    return top, tl.min(tl.where(best == top, place + lanes, vocab - 1))


@triton.jit
def _kept(logits, top, temperature, least):
    """The weights in float64, 0 below ``least``."""
    weights = weights_of(logits, top, temperature)
    return tl.where(weights >= least, weights, 0.0).to(tl.float64)


@triton.jit
def _sums(row, vocab, top, temperature, least, BLOCK: tl.constexpr):
    """The sum of the kept weights of each lane: of the tokens that are equal modulo BLOCK."""
    sums = tl.zeros((BLOCK,), dtype=tl.float64)
    lanes = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, loop_unroll_factor=4):
        sums += _kept(load_logits(row, start + lanes, vocab, MASKED=False), top, temperature, least)
    for start in range(whole, vocab, BLOCK):
        sums += _kept(load_logits(row, start + lanes, vocab, MASKED=True), top, temperature, least)
    return sums


@triton.jit
def _at_point(row, vocab, top, temperature, least, point, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """The token at ``point`` of the cumulative sum of the kept weights, lane after lane."""
    sums = _sums(row, vocab, top, temperature, least, BLOCK)
    goal = point * tl.sum(sums)
    lane = tl.minimum(tl.sum((tl.cumsum(sums) <= goal).to(tl.int32)), BLOCK - 1)
    goal -= tl.sum(tl.where(tl.arange(0, BLOCK) < lane, sums, 0.0))
    tokens = lane + BLOCK * tl.arange(0, MOST)
    ends = tl.cumsum(_kept(load_logits(row, tokens, vocab, MASKED=True), top, temperature, least))
    return tl.minimum(lane + BLOCK * tl.sum((ends <= goal).to(tl.int32)), vocab - 1)


@triton.jit(do_not_specialize=["vocab", "rows"])
def pick_tokens(logits, stride, vocab, rows, numbers, points, tokens, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """One program a row. ``numbers`` is None where all are greedy."""
    t = tl.program_id(0)
    row = logits + t.to(tl.int64) * stride
    top, token = _best(row, vocab, BLOCK)
    token = tl.where(tl.abs(top) < float("inf"), token, -1)
    if numbers is not None:
        temperature = tl.load(numbers + t).to(tl.float32)
        if (temperature > 0) & (token >= 0):
            top_k, top_p = tl.load(numbers + rows + t), tl.load(numbers + 2 * rows + t)
            least = min_p_weight(tl.load(numbers + 3 * rows + t))
            if (top_k < vocab) | (top_p < 1):
                least = tl.maximum(least, cut(row, vocab, top, temperature, top_k, top_p, BLOCK))
            token = _at_point(row, vocab, top, temperature, least, tl.load(points + t), BLOCK, MOST)
    tl.store(tokens + t, token.to(tl.int64))
