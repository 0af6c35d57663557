"""The kernel behind ``deltazip_kernels.quantize``."""

import triton
import triton.language as tl

_STEP = tl.constexpr(16)
SMALLEST = tl.constexpr(1e-30)
"""A row whose largest magnitude is below this counts as zero: its inverse scale would overflow."""


@triton.jit
def _load_groups(x, start, K):
    """float32 [_STEP groups, 32 quads, 4] of a row, zero beyond K."""
    group = start + tl.arange(0, _STEP)[:, None, None]
    column = group * 128 + tl.arange(0, 32)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    return tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)


@triton.jit
def quantize(x, x_stride, values, scales, K, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    largest = tl.zeros((_STEP, 32, 4), dtype=tl.float32)
    for start in tl.range(0, GROUPS, _STEP):
        largest = tl.maximum(largest, tl.abs(_load_groups(x, start, K)))
    top = tl.max(tl.reshape(largest, (_STEP * 128,)), axis=0)
    live = top > SMALLEST
    inverse = tl.where(live, 127.0 / tl.where(live, top, 1.0), 0.0)
    tl.store(scales + row, tl.where(live, top / 127.0, 0.0))
    group = tl.arange(0, _STEP)[:, None, None]
    position = tl.arange(0, 4)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    for start in tl.range(0, GROUPS, _STEP):
        q = tl.floor(_load_groups(x, start, K) * inverse + 0.5).to(tl.int8)
        at = (start + group) * 128 + position
        tl.store(values + row * (GROUPS * 128) + at, tl.permute(q, (0, 2, 1)), mask=start + group < GROUPS)
