"""Everything between the q|k|v projection and attention in one launch: head norms, rotation, the write to the cache."""

from dataclasses import dataclass

from torch import Tensor

from deltazip_kernels.device.rope import rope
from deltazip_kernels.launch import ceil_div, overlap, power_of_2

_ELEMENTS = 512  # a program holds so many elements of the left halves of its heads, and of the right ones


@dataclass(frozen=True)
class HeadNorm:
    """RMS norms of heads (Qwen 3). Weights are [versions, D]; row ``t`` uses those of version ``which[t]`` (int32)."""

    q: Tensor
    k: Tensor
    which: Tensor
    epsilon: float


@dataclass(frozen=True)
class RotaryTables:
    """``cos`` and ``sin`` [positions, rotated columns / 2] float32; column ``i`` is paired with ``i + rotated / 2``."""

    cos: Tensor
    sin: Tensor


def rope_and_cache(
    qkv: Tensor,
    positions: Tensor,
    tables: RotaryTables,
    k_cache: Tensor,
    v_cache: Tensor,
    where: Tensor,
    norm: HeadNorm | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Return q [T, H, D], normed and rotated; write k, likewise, and v to positions ``where`` of the caches.

    ``qkv`` is [T, (H + 2 G) D] with contiguous rows; ``positions`` and ``where`` are [T] int64. The caches are
    [blocks, page, G, D], each block contiguous; position ``p`` is token ``p % page`` of block ``p // page``. Nothing is
    cached where ``where`` is -1; if another value occurs twice, what is cached there is undefined. Rotation is in
    float32; columns behind the rotated ones stay (GPT-NeoX). With ``scales`` [blocks, 2, G, page] float32, each block
    contiguous, the caches are in float8_e4m3fn. Raises ValueError for shapes that do not fit.
    """
    rows, width = qkv.shape
    page, groups, dim = k_cache.shape[1:]
    half = tables.cos.shape[1]
    heads = width // dim - 2 * groups
    if heads < 1 or (heads + 2 * groups) * dim != width or v_cache.shape[1:] != k_cache.shape[1:] or 2 * half > dim:
        raise ValueError(
            f"q|k|v {(rows, width)} and tables of {half} columns do not fit a cache {tuple(k_cache.shape)}"
        )
    if qkv.stride(1) != 1 or {k_cache.stride()[1:], v_cache.stride()[1:]} != {(groups * dim, dim, 1)}:
        raise ValueError("rows of q|k|v and blocks of the caches must be contiguous")
    q = qkv.new_empty((rows, heads, dim))
    if rows:
        width = power_of_2(half)
        block = max(1, min(_ELEMENTS // width, power_of_2(heads + 2 * groups)))
        rope[(rows, ceil_div(heads + 2 * groups, block))](
            qkv,
            qkv.stride(0),
            positions,
            tables.cos,
            tables.sin,
            where,
            q,
            k_cache,
            k_cache.stride(0),
            v_cache,
            v_cache.stride(0),
            qkv if scales is None else scales,
            0 if scales is None else scales.stride(0),
            norm.q if norm else qkv,
            norm.k if norm else qkv,
            norm.which if norm else where,
            norm.epsilon if norm else 0.0,
            PAGE=page,
            SCALED=scales is not None,
            H=heads,
            G=groups,
            D=dim,
            HALF=half,
            NORM=norm is not None,
            BLOCK=block,
            WIDTH=width,
            TAIL=power_of_2(max(1, dim - 2 * half)),
            num_warps=2,
            **overlap(qkv.device),
        )
    return q
