"""Attention over a paged cache: any mixture of lengths in one launch, whose size does not depend on them.

Work is cut into items on the host (``attention_items``); their list lies in device memory, so a launch
can be captured in a graph. The context of a decode may be cut into parts, which the last of its programs merges.
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
"""Of decodes, for which a processor has registers."""
_WARPS = 2
"""Of such a program."""
_OWN_KEYS = 16
"""Of each warp of a decode, at a time: the fewest that tensor cores take."""


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer, [pages, page, G, D]; all but the first dimension contiguous.

    Those in float8_e4m3fn come with ``scales`` [pages, 2, G, page] float32, of keys and of values, by which they are to
    be multiplied; strided likewise.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True)
class Scoring:
    """From ``q k`` to weights: times ``scale``, then ``cap * tanh(s / cap)``; a query sees its last ``window`` keys."""

    scale: float
    cap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class AttentionWork:
    """A launch on the device: the parts of what ``attention_items.pack`` made."""

    items: Tensor
    """[items * FIELDS] int32; as many as there may be."""
    pages: Tensor
    """int32; where items find the pages of their sequences."""


class Parts:
    """Memory that launches on one stream share: what decodes leave to be merged."""

    def __init__(self, items: int, heads: int, dim: int, device: torch.device) -> None:
        """For launches of up to ``items`` items."""
        self.values = torch.empty((items, heads, dim), dtype=torch.float32, device=device)
        self.weights = torch.empty((items, heads, 2), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(items * heads, dtype=torch.int32, device=device)
        """Parts of a sequence that are there; zero between launches."""


def wanted_items(device: torch.device, kv_heads: int, itemsize: int) -> int:
    """Items of a launch of decodes that keep a device busy, over a cache of numbers of ``itemsize`` bytes."""
    count, _ = _processors(device)
    return max(1, _programs(itemsize) * count // kv_heads)


def decode_attention(
    q: Tensor, cache: PagedCache, work: AttentionWork, scoring: Scoring, parts: Parts, out: Tensor
) -> None:
    """Attention of the rows of ``q`` [T, H, D] in ``work``, each the last token of a sequence, to those of ``out``.

    ``q`` and ``out`` are contiguous.
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
    """For each processor: the fewest that keep its share of memory busy. Over fp8, of half the bytes, all."""
    return _MOST_PROGRAMS if itemsize == 1 else 2


def _decode_stages(programs: int, keys: Tensor) -> int:
    """Stages of the loop, two for each tile of keys on its way and one: so many tiles that a processor has room for its
    share of the programs and no more.

    Else, behind a GEMM that still runs, the first processors that are free would take the share of others.
    """
    count, shared_bytes = _processors(keys.device)
    share = max(ceil_div(programs, count), _programs(keys.dtype.itemsize))
    if share >= _MOST_PROGRAMS:
        return 7
    tile = _WARPS * _OWN_KEYS * 2 * keys.shape[3] * keys.dtype.itemsize
    return 2 * min(shared_bytes // ((share + 1) * tile) + 1, 5) + 1


def prefill_attention(q: Tensor, cache: PagedCache, work: AttentionWork, scoring: Scoring, out: Tensor) -> None:
    """The same for rows that are the last tokens of sequences, in items of :func:`prefill_queries` each."""
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
    """Queries that an item of a prefill has at most."""
    return max(1, _prefill_rows(dtype, dim) // (heads // kv_heads))


def _prefill_rows(dtype: torch.dtype, dim: int) -> int:
    return 128 if dtype.itemsize * dim <= 256 else 64


@cache
def _processors(device: torch.device) -> tuple[int, int]:
    """How many, and the bytes of shared memory of each."""
    if device.type != "cuda":
        return 1, 0
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_multiprocessor


def _arguments(
    q: Tensor, cache: PagedCache, work: AttentionWork, scoring: Scoring, out: Tensor
) -> tuple[Tensor | int | float, ...]:
    """What both kernels begin with."""
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
    """The constants that both have."""
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
