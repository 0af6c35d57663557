"""The kernels behind ``deltazip_ray.compress.triton_grid``.

A program holds one group of some rows in registers, ``[ROWS, 128]``. Columns beyond the matrix weigh nothing.
"""

import triton
import triton.language as tl

from deltazip_ray.compress import grid

TINY = tl.constexpr(1.1754943508222875e-38)
HIGHEST, STEP = tl.constexpr(grid.CLIP_HIGHEST), tl.constexpr(grid.CLIP_STEP)


@triton.jit
def _bf16(x):
    """``x`` rounded to the nearest bfloat16, ties to even, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _codes(values, scales, ZERO: tl.constexpr, TOP: tl.constexpr):
    """Nearest codes of ``values`` under ``scales``, which broadcast against them; a scale of 0 makes all code 0."""
    steps = tl.where(scales > 0, values / tl.maximum(scales, TINY), 0.0)
    # Adding 2^23 leaves no bits behind the point: the nearest whole number, ties to even.
    return (tl.minimum(tl.maximum(steps + ZERO, 0.0), TOP) + 8388608.0) - 8388608.0


@triton.jit
def _consider(values, weights, scales, best, best_error, ZERO: tl.constexpr, TOP: tl.constexpr):
    scales = _bf16(scales)
    lost = values - (_codes(values, scales[:, None], ZERO, TOP) - ZERO) * scales[:, None]
    error = tl.sum(weights * lost * lost, 1)
    better = error < best_error
    return tl.where(better, scales, best), tl.where(better, error, best_error)


@triton.jit
def _choose_scales(values, weights, ZERO: tl.constexpr, TOP: tl.constexpr, CLIPS: tl.constexpr, REFITS: tl.constexpr):
    """``grid.choose_scales`` of ``values`` [ROWS, 128] and ``weights`` [1, 128]."""
    best = tl.zeros((values.shape[0],), tl.float32)
    best_error = tl.sum(weights * values * values, 1)
    widest = tl.max(tl.where(weights > 0, tl.abs(values), 0.0), 1) / ZERO
    for step in range(CLIPS):
        best, best_error = _consider(values, weights, widest * (HIGHEST - STEP * step), best, best_error, ZERO, TOP)
    for _ in range(REFITS):
        levels = _codes(values, best[:, None], ZERO, TOP) - ZERO
        norm = tl.maximum(tl.sum(weights * levels * levels, 1), TINY)
        fitted = tl.maximum(tl.sum(weights * values * levels, 1), 0.0) / norm
        best, best_error = _consider(values, weights, fitted, best, best_error, ZERO, TOP)
    return best


@triton.jit
def _two_of_four(saliency):
    """``grid.keep_two_of_four`` of [ROWS, 128]; what must not be kept has a saliency below 0."""
    fours = tl.reshape(saliency, (saliency.shape[0], 32, 4))
    mine, other = fours[:, :, :, None], fours[:, :, None, :]
    at = tl.arange(0, 4)
    earlier = (at[None, :] < at[:, None])[None, None]
    ahead = (other > mine) | ((other == mine) & earlier)
    return tl.reshape(tl.sum(ahead.to(tl.int32), 3) < 2, saliency.shape)


@triton.jit
def nearest(
    delta,
    delta_stride,
    weights,
    codes,
    kept,
    scales,
    N,
    K,
    ZERO: tl.constexpr,
    TOP: tl.constexpr,
    CLIPS: tl.constexpr,
    REFITS: tl.constexpr,
    SPARSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``grid.round_to_nearest``: one program for some rows of one group. ``kept`` is written if SPARSE."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = group * 128 + tl.arange(0, 128)
    inside = (row < N)[:, None] & (column < K)[None, :]
    values = tl.load(delta + row[:, None] * delta_stride + column[None, :], mask=inside, other=0.0)
    weight = tl.load(weights + column, mask=column < K, other=0.0)[None, :]
    if SPARSE:
        chosen = _two_of_four(tl.where(inside, values * values * weight, -1.0))
        weight = tl.where(chosen, weight, 0.0)
        tl.store(kept + row[:, None] * K + column[None, :], chosen.to(tl.uint8), mask=inside)
    best = _choose_scales(values, weight, ZERO, TOP, CLIPS, REFITS)
    found = _codes(values, best[:, None], ZERO, TOP)
    tl.store(codes + row[:, None] * K + column[None, :], found.to(tl.uint8), mask=inside)
    tl.store(scales + row * tl.num_programs(1) + group, best, mask=row < N)


@triton.jit
def code_group(
    work,
    work_stride,
    factor,
    factor_row,
    factor_column,
    codes,
    codes_stride,
    kept,
    kept_stride,
    scales,
    errors,
    N,
    C,
    ZERO: tl.constexpr,
    TOP: tl.constexpr,
    CLIPS: tl.constexpr,
    REFITS: tl.constexpr,
    SPARSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``grid.code_group``: the C columns of one group in order, one program for some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 128)
    inside = (row < N)[:, None] & (column < C)[None, :]
    values = tl.load(work + row[:, None] * work_stride + column[None, :], mask=inside, other=0.0)
    diagonal = tl.load(factor + column * (factor_row + factor_column), mask=column < C, other=1.0)
    weight = tl.where(column < C, 1.0 / (diagonal * diagonal), 0.0)[None, :]
    chosen = inside
    likely = weight
    if SPARSE:
        likely = tl.where(_two_of_four(tl.where(inside, values * values * weight, -1.0)), weight, 0.0)
    scale = _choose_scales(values, likely, ZERO, TOP, CLIPS, REFITS)
    found = tl.zeros((ROWS, 128), tl.float32)
    error = tl.zeros((ROWS, 128), tl.float32)
    for j in range(C):
        here = (column == j)[None, :]
        value = tl.sum(tl.where(here, values, 0.0), 1)
        code = _codes(value, scale, ZERO, TOP)
        stored = (code - ZERO) * scale
        if SPARSE:
            if j % 4 == 0:
                now = _two_of_four(tl.where(inside, values * values * weight, -1.0))
                chosen = tl.where((column // 4 == j // 4)[None, :], now, chosen)
            stored = tl.where(tl.sum((here & chosen).to(tl.int32), 1) > 0, stored, 0.0)
        lost = (value - stored) / tl.load(factor + j * (factor_row + factor_column))
        found = tl.where(here, code[:, None], found)
        error = tl.where(here, lost[:, None], error)
        # The factor is upper triangular: columns that are done do not change.
        spread = tl.load(factor + j * factor_row + column * factor_column, mask=column < C, other=0.0)
        values -= lost[:, None] * spread[None, :]
    tl.store(codes + row[:, None] * codes_stride + column[None, :], found.to(tl.uint8), mask=inside)
    if SPARSE:
        tl.store(kept + row[:, None] * kept_stride + column[None, :], chosen.to(tl.uint8), mask=inside)
    tl.store(errors + row[:, None] * C + column[None, :], error, mask=inside)
    tl.store(scales + row, scale, mask=row < N)


@triton.jit
def _along(codes, metric, metric_stride, row, N, C, ZERO: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Levels of ``codes`` (a pointer for each of the rows) times ``metric`` [C, C], float32 [ROWS, 128]."""
    column = tl.arange(0, 128)
    found = tl.zeros((ROWS, 128), tl.float32)
    for start in range(0, 128, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        inside = (row < N)[:, None] & (inner < C)[None, :]
        levels = tl.load(codes[:, None] + inner[None, :], mask=inside, other=0).to(tl.float32) - ZERO
        here = (inner < C)[:, None] & (column < C)[None, :]
        weights = tl.load(metric + inner[:, None] * metric_stride + column[None, :], mask=here, other=0.0)
        found += tl.dot(levels, weights, input_precision="ieee")
    return found


@triton.jit
def improve_group(
    delta,
    delta_stride,
    lost,
    lost_stride,
    codes,
    codes_stride,
    scales,
    scales_stride,
    slopes,
    slopes_stride,
    metric,
    metric_stride,
    N,
    C,
    ZERO: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``grid.improve_group``: scale, then the C columns of one group in turn, one program for some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 128)
    inside = (row < N)[:, None] & (column < C)[None, :]
    own = codes + row * codes_stride
    along = _along(own, metric, metric_stride, row, N, C, ZERO, ROWS, 32)
    found = tl.load(own[:, None] + column[None, :], mask=inside, other=0).to(tl.float32)
    slope = tl.load(slopes + row[:, None] * slopes_stride + column[None, :], mask=inside, other=0.0)
    scale = tl.load(scales + row * scales_stride, mask=row < N, other=0.0)
    # Columns beyond the matrix have no slope and no metric: their levels weigh nothing.
    curvature = tl.sum((found - ZERO) * along, 1)
    descent = tl.sum((found - ZERO) * slope, 1)
    change = _bf16(tl.maximum(scale + descent / tl.maximum(curvature, TINY), 0.0)) - scale
    change = tl.where(change * (change * curvature - 2 * descent) < 0, change, 0.0)
    scale += change
    slope -= change[:, None] * along
    for j in range(C):
        here = (column == j)[None, :]
        before = (tl.sum(tl.where(here, found, 0.0), 1) - ZERO) * scale
        gain = tl.sum(tl.where(here, slope, 0.0), 1) / tl.load(metric + j * (metric_stride + 1))
        code = _codes(before + gain, scale, ZERO, TOP)
        found = tl.where(here, code[:, None], found)
        spread = tl.load(metric + j * metric_stride + column, mask=column < C, other=0.0)
        slope -= ((code - ZERO) * scale - before)[:, None] * spread[None, :]
    wanted = tl.load(delta + row[:, None] * delta_stride + column[None, :], mask=inside, other=0.0)
    left = wanted - (found - ZERO) * scale[:, None]
    tl.store(own[:, None] + column[None, :], found.to(tl.uint8), mask=inside)
    tl.store(lost + row[:, None] * lost_stride + column[None, :], left, mask=inside)
    tl.store(scales + row * scales_stride, scale, mask=row < N)
