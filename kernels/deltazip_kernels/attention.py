"""Attention over a paged cache: one launch for any mixture of lengths.

The host cuts the work into items of about equal size (``attention_items``). Their list lies in device memory and its
size does not depend on the lengths, so a launch can be captured in a graph. A decode's context may be cut into several
items; the last of their programs to finish merges the parts (split-KV, as in Flash-Decoding).
"""

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from deltazip_kernels.attention_items import FIELDS
from deltazip_kernels.device.attention import attention_decode, attention_prefill
from deltazip_kernels.launch import ceil_div, overlap, power_of_2

_LOG2E = 1.4426950408889634
_MOST_PROGRAMS = 4
"""Decode programs that fit into the registers of a multiprocessor."""
_WARPS = 2
"""Warps of a decode program."""
_OWN_KEYS = 16
"""Keys that one warp of a decode multiplies at a time: the fewest that tensor cores take."""


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer, [pages, page, G, D]: each page is contiguous, pages may lie apart.

    If they are in float8_e4m3fn, ``scales`` [pages, 2, G, page] float32 has a factor for each key (0) and value (1).
    """

    keys: Tensor
    values: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True)
class Scoring:
    """Scores are ``s = scale * q k``, with a cap ``cap * tanh(s / cap)``. A query sees its last ``window`` keys."""

    scale: float
    cap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class AttentionWork:
    """The work of one launch, on the device: slices of what ``attention_items.pack`` made."""

    items: Tensor
    """[items * FIELDS] int32, padded with empty items."""
    pages: Tensor
    """int32: page numbers; each item says where those of its sequence begin."""


class Parts:
    """Partial results of decodes whose context was cut. Launches that share this must run on one stream."""

    def __init__(self, items: int, heads: int, dim: int, device: torch.device) -> None:
        """For launches of up to ``items`` items."""
        self.values = torch.empty((items, heads, dim), dtype=torch.float32, device=device)
        self.weights = torch.empty((items, heads, 2), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(items * heads, dtype=torch.int32, device=device)
        """Counts a sequence's finished parts; zero between launches."""


def wanted_items(device: torch.device, kv_heads: int, itemsize: int) -> int:
    """How many items of decodes keep the device busy, for a cache with numbers of ``itemsize`` bytes."""
    count, _ = _processors(device)
    return max(1, _programs(itemsize) * count // kv_heads)


def decode_attention(
    q: Tensor, cache: PagedCache, work: AttentionWork, scoring: Scoring, parts: Parts, out: Tensor
) -> None:
    """Write the rows of ``out`` [T, H, D] that ``work`` names. Each row of ``q`` is the last token of its sequence.

    ``q`` and ``out`` are contiguous. Raises ValueError for a cache with other strides.
    """
    page, kv_heads = cache.keys.shape[1:3]
    programs = len(work.items) // FIELDS * kv_heads
    attention_decode[(programs,)](
        *_arguments(q, cache, work, scoring, out),
        parts.values,
        parts.weights,
        parts.arrived,
        M=max(8, power_of_2(q.shape[1] // kv_heads)),
        W=_WARPS,
        N=_OWN_KEYS,
        RUN=gcd(page, _OWN_KEYS),
        STAGES=_decode_stages(programs, cache.keys),
        num_warps=_WARPS,
        **_shape(q, cache, scoring),
    )


def _programs(itemsize: int) -> int:
    """Programs for each multiprocessor: the fewest that read at full speed. Over fp8, half the bytes, that is all."""
    return _MOST_PROGRAMS if itemsize == 1 else 2


def _decode_stages(programs: int, keys: Tensor) -> int:
    """Stages of the loop over keys: two for each tile in flight, and one more.

    So many tiles are in flight that a multiprocessor has shared memory for its share of the programs and no more:
    otherwise, while the GEMM ahead ends, the first free multiprocessors would take the programs of the others.
    """
    count, shared_bytes = _processors(keys.device)
    share = max(ceil_div(programs, count), _programs(keys.dtype.itemsize))
    if share >= _MOST_PROGRAMS:
        return 7
    tile = _WARPS * _OWN_KEYS * 2 * keys.shape[3] * keys.dtype.itemsize
    return 2 * min(shared_bytes // ((share + 1) * tile) + 1, 5) + 1


def prefill_attention(q: Tensor, cache: PagedCache, work: AttentionWork, scoring: Scoring, out: Tensor) -> None:
    """Likewise for several last tokens of each sequence, in items of up to :func:`prefill_queries` rows."""
    heads, dim = q.shape[1:]
    kv_heads = cache.keys.shape[2]
    small = q.dtype.itemsize * dim <= 256
    attention_prefill[(len(work.items) // FIELDS * kv_heads,)](
        *_arguments(q, cache, work, scoring, out),
        WINDOW=scoring.window or 0,
        M=max(_prefill_rows(q.dtype, dim), power_of_2(heads // kv_heads)),
        N=64 if small else 32,
        STAGES=3 if small else 2,
        num_warps=8 if small else 4,
        **_shape(q, cache, scoring),
    )


def prefill_queries(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> int:
    """Maximum rows of a prefill's item."""
    return max(1, _prefill_rows(dtype, dim) // (heads // kv_heads))


def _prefill_rows(dtype: torch.dtype, dim: int) -> int:
    return 128 if dtype.itemsize * dim <= 256 else 64


@cache
def _processors(device: torch.device) -> tuple[int, int]:
    """The number of multiprocessors, and the bytes of shared memory of each."""
    if device.type != "cuda":
        return 1, 0
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_multiprocessor


def _arguments(
    q: Tensor, cache: PagedCache, work: AttentionWork, scoring: Scoring, out: Tensor
) -> tuple[Tensor | int | float, ...]:
    """The first arguments of both kernels."""
    kv_heads, dim = cache.keys.shape[2:]
    if cache.keys.stride() != cache.values.stride() or cache.keys.stride()[1:] != (kv_heads * dim, dim, 1):
        raise ValueError(f"keys and values of strides {cache.keys.stride()} and {cache.values.stride()}")
    scales = cache.scales
    return (
        q,
        cache.keys,
        cache.values,
        q if scales is None else scales,
        work.pages,
        cache.keys.stride(0),
        cache.keys.stride(1),
        0 if scales is None else scales.stride(0),
        work.items,
        out,
        scoring.scale * (1.0 if scoring.cap else _LOG2E),
    )


def _shape(q: Tensor, cache: PagedCache, scoring: Scoring) -> dict[str, Any]:
    """The compile-time constants of both kernels."""
    page, kv_heads, dim = cache.keys.shape[1:]
    return {
        "CAP": scoring.cap or 0.0,
        "HEADS": kv_heads,
        "G": q.shape[1] // kv_heads,
        "PAGE": page,
        "D": dim,
        "WIDTH": max(16, power_of_2(dim)),
        "SCALED": cache.scales is not None,
    } | overlap(q.device)
