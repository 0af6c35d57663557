"""Paged attention by our own kernels: any mixture of lengths in one launch, alone or in CUDA graphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltazip_kernels.attention import (
    AttentionWork,
    PagedCache,
    Parts,
    Scoring,
    decode_attention,
    prefill_attention,
    prefill_queries,
    wanted_items,
)
from deltazip_kernels.attention_items import FIELDS, Contexts, decode_items, pack, prefill_items
from deltazip_ray.layers.attention.backend import SequenceRows
from deltazip_ray.layers.attention.cache import CacheShape
from deltazip_ray.layers.attention.capture import CapturableBackend
from deltazip_ray.layers.attention.tables import cache_rows, page_tables
from deltazip_ray.layers.staging import to_device

Windows = Mapping[int | None, AttentionWork]
"""Work by the window of a layer."""


@dataclass(frozen=True)
class PagedPlan:
    """One step; decodes and prefills have rows of their own."""

    where: torch.Tensor
    """``[rows]`` int64."""
    decodes: Windows | None = None
    prefills: Windows | None = None


class PagedBackend(CapturableBackend[PagedPlan]):
    """Decodes and prefills of a mixed step run apart, each in tiles that suit them."""

    def __init__(
        self,
        shape: CacheShape,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        *,
        decodes: int,
    ) -> None:
        """For steps with up to ``decodes`` decodes."""
        super().__init__(shape, dtype, device, kv_dtype)
        self.windows = tuple(dict.fromkeys(shape.window(layer) for layer in range(shape.layers)))
        self._wanted = wanted_items(device, shape.kv_heads)
        self._parts = Parts(self._items(decodes), shape.heads, shape.head_dim, device)

    def plan(self, sequences: Sequence[SequenceRows]) -> PagedPlan:
        """See :meth:`AttentionBackend.plan`."""
        queries = np.array([sequence.queries for sequence in sequences])
        rows = np.cumsum(queries) - queries
        decoding = [i for i, sequence in enumerate(sequences) if sequence.queries == 1]
        filling = [i for i, sequence in enumerate(sequences) if sequence.queries > 1]
        decodes: Windows | None = None
        prefills: Windows | None = None
        if decoding:
            packed = self._pack_decodes([sequences[i] for i in decoding], rows[decoding])
            decodes = self._windows(to_device(packed, self.device), self._items(len(decoding)), len(decoding) + 1)
        if filling:
            prefills = self._prefills([sequences[i] for i in filling], rows[filling])
        return PagedPlan(to_device(cache_rows(sequences, self.shape.block_size), self.device), decodes, prefills)

    def graph_inputs(self, rows: int, pages: int) -> dict[str, int]:
        """See :meth:`CapturableBackend.graph_inputs`."""
        return {"work": len(self.windows) * (self._items(rows) * FIELDS + rows + 1) + pages}

    def fill(self, sequences: Sequence[SequenceRows], tables: Mapping[str, np.ndarray]) -> int:
        """See :meth:`CapturableBackend.fill`."""
        packed = self._pack_decodes(sequences, np.arange(len(sequences)))
        tables["work"][: len(packed)] = packed
        tables["where"][: len(sequences)] = cache_rows(sequences, self.shape.block_size)
        return len(packed)

    def captured_plan(self, where: torch.Tensor, tables: Mapping[str, torch.Tensor]) -> PagedPlan:
        """See :meth:`CapturableBackend.captured_plan`."""
        return PagedPlan(where, self._windows(tables["work"], self._items(len(where)), len(where) + 1))

    def _items(self, rows: int) -> int:
        """The most that ``rows`` decodes are cut into."""
        return rows + self._wanted

    def _pack_decodes(self, sequences: Sequence[SequenceRows], rows: np.ndarray) -> np.ndarray:
        """The work of decodes in ``rows`` ``[n]`` of a step: see ``attention_items.pack``; a launch for each window."""
        contexts, pages = self._contexts(sequences, rows)
        launches = [decode_items(contexts, self._wanted, window) for window in self.windows]
        return pack(launches, pages, self._items(len(rows)))

    def _prefills(self, sequences: Sequence[SequenceRows], rows: np.ndarray) -> Windows:
        """The work of sequences whose rows begin at ``rows`` ``[n]``."""
        shape = self.shape
        queries = prefill_queries(self.dtype, shape.heads, shape.kv_heads, shape.head_dim)
        contexts, pages = self._contexts(sequences, rows)
        launches = [prefill_items(contexts, queries, window) for window in self.windows]
        most = len(launches[0].items)
        return self._windows(to_device(pack(launches, pages, most), self.device), most, 0)

    def _contexts(self, sequences: Sequence[SequenceRows], rows: np.ndarray) -> tuple[Contexts, np.ndarray]:
        tables = page_tables(sequences, self.shape.block_size)
        queries = np.array([sequence.queries for sequence in sequences])
        lengths = np.array([sequence.context for sequence in sequences])
        return Contexts(rows, queries, lengths, tables.starts[:-1]), tables.pages

    def _windows(self, packed: torch.Tensor, most: int, firsts: int) -> Windows:
        """The parts of ``packed``, with ``most`` items a window and so many ``firsts``."""
        count = len(self.windows)
        items = packed[: count * most * FIELDS].chunk(count)
        behind = packed[count * most * FIELDS :]
        return {
            window: AttentionWork(items[i], behind[i * firsts : (i + 1) * firsts], packed)
            for i, window in enumerate(self.windows)
        }

    def attend(self, layer: int, q: torch.Tensor, plan: PagedPlan) -> torch.Tensor:
        """See :meth:`AttentionBackend.attend`."""
        shape, kv = self.shape, self.layers[layer]
        window = shape.window(layer)
        cache = PagedCache(kv.keys, kv.values, kv.scales)
        scoring = Scoring(shape.factor, shape.softcap, window)
        out = torch.empty_like(q)
        if plan.decodes is not None:
            decode_attention(q, cache, plan.decodes[window], scoring, self._parts, out)
        if plan.prefills is not None:
            prefill_attention(q, cache, plan.prefills[window], scoring, out)
        return out.flatten(1)
