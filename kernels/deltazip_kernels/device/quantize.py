"""The kernel behind ``deltazip_kernels.quantize``."""

import triton
import triton.language as tl

SMALLEST = tl.constexpr(1e-30)
"""A row whose largest magnitude is below this counts as zero: its inverse scale would overflow."""


@triton.jit
def _load_groups(x, first, K, STEP: tl.constexpr):
    """float32 [STEP groups, 32 quads, 4] of a row from group ``first`` on, zero beyond K."""
    group = first + tl.arange(0, STEP)[:, None, None]
    column = group * 128 + tl.arange(0, 32)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    return tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)


@triton.jit
def _store_groups(values, v, inverse, first, GROUPS: tl.constexpr, STEP: tl.constexpr):
    group = first + tl.arange(0, STEP)[:, None, None]
    position = tl.arange(0, 4)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    q = tl.permute(tl.floor(v * inverse + 0.5).to(tl.int8), (0, 2, 1))
    tl.store(values + group * 128 + position, q, mask=group < GROUPS)


@triton.jit
def quantize(
    x,
    x_stride,
    values,
    scales,
    K,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One row a program, STEP groups at a time; a row of up to STEP groups is read once."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    values += row * (GROUPS * 128)
    v = _load_groups(x, 0, K, STEP)
    largest = tl.abs(v)
    for first in tl.range(STEP, GROUPS, STEP):
        largest = tl.maximum(largest, tl.abs(_load_groups(x, first, K, STEP)))
    top = tl.max(tl.reshape(largest, (STEP * 128,)), axis=0)
    live = top > SMALLEST
    inverse = tl.where(live, 127.0 / tl.where(live, top, 1.0), 0.0)
    tl.store(scales + row, tl.where(live, top / 127.0, 0.0))
    _store_groups(values, v, inverse, 0, GROUPS, STEP)
    for first in tl.range(STEP, GROUPS, STEP):
        _store_groups(values, _load_groups(x, first, K, STEP), inverse, first, GROUPS, STEP)
