"""Paged attention by our own kernels (decision 018).

Decodes and prefills of a mixed step run in separate launches. :class:`PagedDecodes` runs decodes, also in CUDA graphs,
and leaves prefills to its subclasses: our kernels here, FlashInfer in ``flashinfer.py``.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

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
from deltazip_ray.kvcache.block_manager import BlockTable
from deltazip_ray.layers.attention.backend import SequenceRows
from deltazip_ray.layers.attention.cache import CacheShape
from deltazip_ray.layers.attention.capture import CapturableBackend
from deltazip_ray.layers.attention.tables import cache_rows, joined, page_tables
from deltazip_ray.layers.staging import to_device

Windows = Mapping[int | None, AttentionWork]
"""The work of a launch for layers of each window; None is no window."""

PrefillsT = TypeVar("PrefillsT")
"""A subclass's preparations for prefills."""


@dataclass(frozen=True)
class PagedPlan(Generic[PrefillsT]):
    """One step."""

    where: torch.Tensor
    """See :class:`~deltazip_ray.layers.attention.backend.AttentionPlan`."""
    decodes: Windows | None = None
    prefills: PrefillsT | None = None


class PagedDecodes(CapturableBackend[PagedPlan[PrefillsT]]):
    """Decodes by our own kernels. A subclass adds prefills, which are sequences with more than one row."""

    def __init__(
        self,
        shape: CacheShape,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        *,
        decodes: int,
    ) -> None:
        """``decodes``: the maximum of a step."""
        super().__init__(shape, dtype, device, kv_dtype)
        self.windows = tuple(dict.fromkeys(shape.window(layer) for layer in range(shape.layers)))
        self._wanted = wanted_items(device, shape.kv_heads, self.kv_dtype.itemsize)
        self._parts = Parts(self._items(decodes), shape.heads, shape.head_dim, device)

    @abstractmethod
    def plan_prefills(self, sequences: Sequence[SequenceRows], rows: np.ndarray) -> PrefillsT:
        """Prepare ``sequences``, whose first rows in the step are ``rows`` ``[n]``."""

    @abstractmethod
    def attend_prefills(self, layer: int, q: torch.Tensor, plan: PrefillsT, out: torch.Tensor) -> None:
        """Write their rows of ``out``, from the same rows of ``q``; both are ``[rows, heads, head_dim]``.

        May write anything to the rows of decodes, whose launch comes later.
        """

    def plan(self, sequences: Sequence[SequenceRows]) -> PagedPlan[PrefillsT]:
        """See :meth:`AttentionBackend.plan`."""
        queries = np.array([sequence.queries for sequence in sequences])
        rows = np.cumsum(queries) - queries
        decoding = [i for i, sequence in enumerate(sequences) if sequence.queries == 1]
        filling = [i for i, sequence in enumerate(sequences) if sequence.queries > 1]
        decodes: Windows | None = None
        prefills: PrefillsT | None = None
        if decoding:
            _, lengths, blocks = zip(*[sequences[i] for i in decoding], strict=True)
            packed = self._pack_decodes(rows[decoding], np.array(lengths), *joined(blocks))
            most = self._items(len(decoding))
            decodes = self.by_window(to_device(packed, self.device), most)
        if filling:
            prefills = self.plan_prefills([sequences[i] for i in filling], rows[filling])
        return PagedPlan(to_device(cache_rows(sequences, self.shape.block_size), self.device), decodes, prefills)

    def graph_inputs(self, rows: int, pages: int) -> dict[str, int]:
        """See :meth:`CapturableBackend.graph_inputs`."""
        return {"work": len(self.windows) * self._items(rows) * FIELDS + pages}

    def fill(self, positions: np.ndarray, blocks: Sequence[BlockTable], tables: Mapping[str, np.ndarray]) -> int:
        """See :meth:`CapturableBackend.fill`."""
        starts, pages = joined(blocks)
        packed = self._pack_decodes(np.arange(len(positions)), positions + 1, starts, pages)
        tables["work"][: len(packed)] = packed
        page, offset = np.divmod(positions, self.shape.block_size)
        tables["where"][: len(positions)] = pages[starts[:-1] + page].astype(np.int64) * self.shape.block_size + offset
        return len(packed)

    def captured_plan(self, where: torch.Tensor, tables: Mapping[str, torch.Tensor]) -> PagedPlan[PrefillsT]:
        """See :meth:`CapturableBackend.captured_plan`."""
        return PagedPlan(where, self.by_window(tables["work"], self._items(len(where))))

    def _items(self, rows: int) -> int:
        """The maximum number of items of ``rows`` decodes."""
        return max(rows, self._wanted)

    def _pack_decodes(self, rows: np.ndarray, lengths: np.ndarray, starts: np.ndarray, pages: np.ndarray) -> np.ndarray:
        """The work of decodes in ``rows`` ``[n]`` of a step, a launch for each window: see ``attention_items.pack``.

        They see ``lengths`` ``[n]`` tokens. ``starts`` and ``pages``: see
        :func:`~deltazip_ray.layers.attention.tables.joined`.
        """
        contexts = Contexts(rows, np.ones_like(rows), lengths, starts[:-1])
        launches = [decode_items(contexts, self._wanted, window) for window in self.windows]
        return pack(launches, pages, self._items(len(rows)))

    def by_window(self, packed: torch.Tensor, most: int) -> Windows:
        """The parts of ``packed``, which has ``most`` items for each window."""
        items = packed[: len(self.windows) * most * FIELDS].chunk(len(self.windows))
        return {window: AttentionWork(items[i], packed) for i, window in enumerate(self.windows)}

    def attend(self, layer: int, q: torch.Tensor, plan: PagedPlan[PrefillsT]) -> torch.Tensor:
        """See :meth:`AttentionBackend.attend`."""
        out = torch.empty_like(q)
        if plan.prefills is not None:
            self.attend_prefills(layer, q, plan.prefills, out)
        if plan.decodes is not None:
            work = plan.decodes[self.shape.window(layer)]
            decode_attention(q, self.cache(layer), work, self.scoring(layer), self._parts, out)
        return out.flatten(1)

    def cache(self, layer: int) -> PagedCache:
        """The cache of a layer, as kernels take it."""
        kv = self.layers[layer]
        return PagedCache(kv.keys, kv.values, kv.scales)

    def scoring(self, layer: int) -> Scoring:
        """The scoring of a layer, as kernels take it."""
        return Scoring(self.shape.factor, self.shape.softcap, self.shape.window(layer))


class PagedBackend(PagedDecodes[Windows]):
    """Prefills by our own kernels too."""

    def plan_prefills(self, sequences: Sequence[SequenceRows], rows: np.ndarray) -> Windows:
        """See :meth:`PagedDecodes.plan_prefills`."""
        shape = self.shape
        queries = prefill_queries(self.dtype, shape.heads, shape.kv_heads, shape.head_dim)
        tables = page_tables(sequences, shape.block_size)
        counts = np.array([(sequence.queries, sequence.context) for sequence in sequences])
        contexts = Contexts(rows, counts[:, 0], counts[:, 1], tables.starts[:-1])
        launches = [prefill_items(contexts, queries, window) for window in self.windows]
        most = len(launches[0])
        return self.by_window(to_device(pack(launches, tables.pages, most), self.device), most)

    def attend_prefills(self, layer: int, q: torch.Tensor, plan: Windows, out: torch.Tensor) -> None:
        """See :meth:`PagedDecodes.attend_prefills`."""
        work = plan[self.shape.window(layer)]
        prefill_attention(q, self.cache(layer), work, self.scoring(layer), out)
