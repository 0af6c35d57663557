"""Attention over a paged cache: any mixture of lengths in one launch, whose size does not depend on them.

Work is cut into items on the host (``attention_items``); their list lies in device memory, so a launch
can be captured in a graph. The context of a decode may be cut into parts, which a second launch merges.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from deltazip_kernels.attention_items import FIELDS
from deltazip_kernels.device.attention import attention, attention_merge
from deltazip_kernels.launch import overlap, power_of_2

_LOG2E = 1.4426950408889634
_PROGRAMS = 2
"""Of decodes, for each processor."""


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
    firsts: Tensor
    """[sequences + 1] int32, of decodes."""
    pages: Tensor
    """int32; where items find the pages of their sequences."""


class Parts:
    """Memory that launches on one stream share: what decodes leave to be merged."""

    def __init__(self, items: int, heads: int, dim: int, device: torch.device) -> None:
        """For launches of up to ``items`` items."""
        self.values = torch.empty((items, heads, dim), dtype=torch.float32, device=device)
        self.logs = torch.empty((items, heads), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Tile:
    """How a program works: ``rows`` heads by ``keys``, with warps, and stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def wanted_items(device: torch.device, kv_heads: int) -> int:
    """Items of a launch of decodes that keep a device busy."""
    return max(1, _PROGRAMS * _processors(device) // kv_heads)


def decode_attention(
    q: Tensor, cache: PagedCache, work: AttentionWork, scoring: Scoring, parts: Parts, out: Tensor
) -> None:
    """Attention of the rows of ``q`` [T, H, D] in ``work``, each the last token of a sequence, to those of ``out``.

    ``q`` and ``out`` are contiguous.
    """
    _launch(q, cache, work, scoring, _decode_tile(q), out, parts)
    heads, dim = q.shape[1:]
    kv_heads = cache.keys.shape[2]
    group = heads // kv_heads
    attention_merge[(len(work.firsts) - 1, kv_heads)](
        parts.values,
        parts.logs,
        work.items,
        work.firsts,
        out,
        HEADS=kv_heads,
        G=group,
        GROUP=power_of_2(group),
        D=dim,
        WIDTH=power_of_2(dim),
        num_warps=4,
        **overlap(q.device),
    )


def prefill_attention(q: Tensor, cache: PagedCache, work: AttentionWork, scoring: Scoring, out: Tensor) -> None:
    """The same for rows that are the last tokens of sequences, in items of :func:`prefill_queries` each."""
    _launch(q, cache, work, scoring, _prefill_tile(q.dtype, q.shape[2]), out, None)


def prefill_queries(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> int:
    """Queries that an item of a prefill has at most."""
    return max(1, _prefill_tile(dtype, dim).rows // (heads // kv_heads))


def _decode_tile(q: Tensor) -> Tile:
    return Tile(16, 64, 2, 5) if q.dtype.itemsize * q.shape[2] <= 256 else Tile(16, 32, 4, 4)


def _prefill_tile(dtype: torch.dtype, dim: int) -> Tile:
    return Tile(128, 64, 8, 3) if dtype.itemsize * dim <= 256 else Tile(64, 32, 4, 2)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch(
    q: Tensor,
    cache: PagedCache,
    work: AttentionWork,
    scoring: Scoring,
    tile: Tile,
    out: Tensor,
    parts: Parts | None,
) -> None:
    """Without ``parts`` items are whole, and causal."""
    heads, dim = q.shape[1:]
    page, kv_heads = cache.keys.shape[1:3]
    group = heads // kv_heads
    if cache.keys.stride() != cache.values.stride() or cache.keys.stride()[1:] != (kv_heads * dim, dim, 1):
        raise ValueError(f"keys and values of strides {cache.keys.stride()} and {cache.values.stride()}")
    scales = cache.scales
    attention[(len(work.items) // FIELDS * kv_heads,)](
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
        out if parts is None else parts.values,
        out if parts is None else parts.logs,
        scoring.scale * (1.0 if scoring.cap else _LOG2E),
        CAP=scoring.cap or 0.0,
        WINDOW=scoring.window or 0,
        CAUSAL=parts is None,
        HEADS=kv_heads,
        G=group,
        PAGE=page,
        D=dim,
        WIDTH=max(16, power_of_2(dim)),
        SCALED=scales is not None,
        M=max(tile.rows, power_of_2(group)),
        N=tile.keys,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **overlap(q.device),
    )
