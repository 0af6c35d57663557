"""Paged attention by FlashInfer: for NVIDIA GPUs, decode steps in CUDA graphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flashinfer
import numpy as np
import torch
from flashinfer.decode import fast_decode_plan

from deltazip_ray.layers.attention.backend import SequenceRows
from deltazip_ray.layers.attention.cache import CacheShape
from deltazip_ray.layers.attention.capture import CapturableBackend
from deltazip_ray.layers.attention.tables import PagedTables, cache_rows, page_tables
from deltazip_ray.layers.staging import to_device

_WORKSPACE = 256 << 20
_INTEGERS = 8 << 20


@dataclass(frozen=True)
class Part:
    """Rows of a step that run together."""

    rows: torch.Tensor | None
    """``[rows]`` int64, which of the step's; None: all."""
    wrappers: Mapping[int | None, Any]
    """By window of a layer; FlashInfer's own plans are inside."""


@dataclass(frozen=True)
class FlashInferPlan:
    """One step."""

    where: torch.Tensor
    """``[rows]`` int64."""
    parts: tuple[Part, ...]


class _Staging:
    """Memory for the plans of one kind of wrapper."""

    def __init__(self, device: torch.device, *, locked: bool) -> None:
        """``locked``: in page-locked memory; without, plans are small, and wait for no delta (layers/staging.py)."""
        self._integers = torch.empty(_INTEGERS, dtype=torch.uint8, device=device)
        # A plan is copied from page-locked memory when the device comes to it. At most one step is launched ahead, so
        # with two of them in turn none is overwritten before it was read.
        self._staged = [torch.empty(_INTEGERS, dtype=torch.uint8, pin_memory=locked) for _ in range(2)]

    def prepare(self, wrapper: Any) -> Any:
        """``wrapper``, about to plan."""
        self._staged.reverse()
        wrapper._int_workspace_buffer = self._integers
        wrapper._pin_memory_int_workspace_buffer = self._staged[0]
        return wrapper


class _Window:
    """What layers of one window share."""

    def __init__(self, window: int | None, workspace: torch.Tensor) -> None:
        device = workspace.device
        self.left = -1 if window is None else window - 1
        self.prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=_hopper(device))
        self.decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        self.captured: dict[int, Any] = {}
        """By rows, for graphs."""
        self.prefills, self.decodes = _Staging(device, locked=True), _Staging(device, locked=False)


class FlashInferBackend(CapturableBackend[FlashInferPlan]):
    """Prefills and decodes of a mixed step run apart, each in the kernels that suit them."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        """Takes memory for workspaces. FlashInfer compiles its kernels at the first use of a head size and type."""
        super().__init__(shape, dtype, device)
        self._workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
        self._windows = {w: _Window(w, self._workspace) for w in {shape.window(i) for i in range(shape.layers)}}
        self._tables = page_tables([], shape.block_size)

    def plan(self, sequences: Sequence[SequenceRows]) -> FlashInferPlan:
        """See :meth:`AttentionBackend.plan`."""
        decodes = [sequence for sequence in sequences if sequence.queries == 1]
        prefills = [sequence for sequence in sequences if sequence.queries > 1]
        parts = []
        for group, plan in ((decodes, self._plan_decodes), (prefills, self._plan_prefills)):
            if group:
                rows = None if len(group) == len(sequences) else self._rows_of(sequences, decodes=group is decodes)
                parts.append(Part(rows, plan(group)))
        return FlashInferPlan(to_device(cache_rows(sequences, self.shape.block_size), self.device), tuple(parts))

    def _rows_of(self, sequences: Sequence[SequenceRows], *, decodes: bool) -> torch.Tensor:
        """``[rows]``: rows of the step that belong to decodes, or to the others."""
        queries = np.array([sequence.queries for sequence in sequences])
        return to_device(np.flatnonzero(np.repeat((queries == 1) == decodes, queries)), self.device)

    def _plan_prefills(self, sequences: Sequence[SequenceRows]) -> dict[int | None, Any]:
        shape = self.shape
        tables = page_tables(sequences, shape.block_size)
        queries = torch.tensor([0, *(sequence.queries for sequence in sequences)]).cumsum(0).int()
        for window in self._windows.values():
            window.prefills.prepare(window.prefill).plan(
                queries,
                torch.from_numpy(tables.starts),
                torch.from_numpy(tables.pages),
                torch.from_numpy(tables.last),
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                shape.block_size,
                causal=True,
                sm_scale=shape.scale,
                window_left=window.left,
                logits_soft_cap=shape.softcap,
                q_data_type=self.dtype,
            )
        return {name: window.prefill for name, window in self._windows.items()}

    def _plan_decodes(self, sequences: Sequence[SequenceRows]) -> dict[int | None, Any]:
        tables = page_tables(sequences, self.shape.block_size)
        for window in self._windows.values():
            self._plan_decode(window, window.decode, window.decode.plan, tables)
        return {name: window.decode for name, window in self._windows.items()}

    def attend(self, layer: int, q: torch.Tensor, plan: FlashInferPlan) -> torch.Tensor:
        """See :meth:`AttentionBackend.attend`."""
        window = self.shape.window(layer)
        pages = (self.layers[layer].keys, self.layers[layer].values)
        if len(plan.parts) == 1:
            whole: torch.Tensor = plan.parts[0].wrappers[window].run(q, pages)
            return whole.flatten(1)
        out = torch.empty_like(q)
        for part in plan.parts:
            out[part.rows] = part.wrappers[window].run(q[part.rows], pages)
        return out.flatten(1)

    def graph_inputs(self, rows: int, pages: int) -> dict[str, int]:
        """See :meth:`CapturableBackend.graph_inputs`."""
        return {"page_starts": rows + 1, "last": rows, "pages": pages}

    def fill(self, sequences: Sequence[SequenceRows], tables: Mapping[str, np.ndarray]) -> int:
        """See :meth:`CapturableBackend.fill`."""
        made = self._tables = page_tables(sequences, self.shape.block_size)
        blocks = made.pages[made.starts[1:] - 1].astype(np.int64)
        tables["where"][: len(blocks)] = blocks * self.shape.block_size + made.last - 1
        tables["page_starts"][: len(made.starts)] = made.starts
        tables["last"][: len(made.last)] = made.last
        tables["pages"][: len(made.pages)] = made.pages
        return len(made.pages)

    def captured_plan(self, where: torch.Tensor, tables: Mapping[str, torch.Tensor]) -> FlashInferPlan:
        """See :meth:`CapturableBackend.captured_plan`."""
        rows = len(where)
        ones = np.ones(rows, dtype=np.int32)
        full = PagedTables(np.arange(rows + 1, dtype=np.int32), ones, ones)
        for window in self._windows.values():
            if rows not in window.captured:
                wrapper = window.captured[rows] = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace,
                    "NHD",
                    use_cuda_graph=True,
                    use_tensor_cores=True,  # on an H200 1.2 times as fast with 32 sequences, twice with 8
                    paged_kv_indptr_buffer=tables["page_starts"][: rows + 1],
                    paged_kv_indices_buffer=tables["pages"],
                    paged_kv_last_page_len_buffer=tables["last"][:rows],
                )
                # The planner of every step takes its kernels from this first, full one.
                self._plan_decode(window, wrapper, wrapper.plan, full)
        return FlashInferPlan(where, (Part(None, {name: w.captured[rows] for name, w in self._windows.items()}),))

    def replan(self, rows: int) -> None:
        """How the work is split, which follows from lengths."""
        tables = self._tables
        for window in self._windows.values():
            wrapper = window.captured[rows]
            starts = torch.from_numpy(tables.starts)
            plan = fast_decode_plan.__get__(wrapper)
            self._plan_decode(window, wrapper, plan, tables, global_override_indptr_cpu=starts)

    def _plan_decode(
        self, window: _Window, wrapper: Any, plan: Any, tables: PagedTables, **options: torch.Tensor
    ) -> None:
        shape = self.shape
        window.decodes.prepare(wrapper)
        plan(
            torch.from_numpy(tables.starts),
            torch.from_numpy(tables.pages),
            torch.from_numpy(tables.last),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.block_size,
            sm_scale=shape.scale,
            window_left=window.left,
            logits_soft_cap=shape.softcap,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
            **options,
        )


def _hopper(device: torch.device) -> str:
    """Hopper has prefill kernels of its own, with its asynchronous copies and tensor cores."""
    return "fa3" if torch.cuda.get_device_capability(device)[0] == 9 else "fa2"
