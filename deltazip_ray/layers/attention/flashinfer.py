"""Paged attention by FlashInfer: for NVIDIA GPUs, decode steps in CUDA graphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flashinfer
import torch
from flashinfer.decode import fast_decode_plan

from deltazip_ray.layers.attention.backend import AttentionBackend, CacheShape, SequenceRows
from deltazip_ray.layers.attention.paged import PagedTables, cache_rows, page_tables

_WORKSPACE = 256 << 20
_INTEGERS = 8 << 20


@dataclass(frozen=True)
class FlashInferPlan:
    """One step."""

    where: torch.Tensor
    """``[rows]`` int64."""
    wrappers: Mapping[int | None, Any]
    """By window of a layer; FlashInfer's own plans are inside."""


class _Window:
    """What layers of one window share."""

    def __init__(self, window: int | None, workspace: torch.Tensor) -> None:
        device = workspace.device
        self.left = -1 if window is None else window - 1
        self.integers = torch.empty(_INTEGERS, dtype=torch.uint8, device=device)
        # A plan is copied from page-locked memory when the device comes to it. At most one step is launched ahead, so
        # with two of them in turn none is overwritten before it was read.
        self._staged = [torch.empty(_INTEGERS, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.mixed = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=_prefill_backend(device))
        self.decodes: dict[int, Any] = {}

    def prepare(self, wrapper: Any) -> Any:
        """``wrapper``, about to plan."""
        self._staged.reverse()
        wrapper._int_workspace_buffer = self.integers
        wrapper._pin_memory_int_workspace_buffer = self._staged[0]
        return wrapper


class FlashInferBackend(AttentionBackend[FlashInferPlan]):
    """Mixed steps are planned and run as prefills; decode steps of a fixed size in wrappers that graphs may hold."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        """Takes memory for workspaces. FlashInfer compiles its kernels at the first use of a head size and type."""
        super().__init__(shape, dtype, device)
        self._workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
        self._windows = {w: _Window(w, self._workspace) for w in {shape.window(i) for i in range(shape.layers)}}
        self._pages: list[tuple[torch.Tensor, torch.Tensor]] = []

    def allocate(self, blocks: int) -> None:
        """See :meth:`AttentionBackend.allocate`."""
        super().allocate(blocks)
        page = (-1, self.shape.block_size, self.shape.kv_heads, self.shape.head_dim)
        self._pages = [(layer.keys.view(page), layer.values.view(page)) for layer in self.layers]

    def plan(self, sequences: Sequence[SequenceRows]) -> FlashInferPlan:
        """See :meth:`AttentionBackend.plan`."""
        shape = self.shape
        tables = page_tables(sequences, shape.block_size)
        queries = torch.tensor([0, *(sequence.queries for sequence in sequences)]).cumsum(0).int()
        for window in self._windows.values():
            window.prepare(window.mixed).plan(
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
        where = torch.from_numpy(cache_rows(sequences, shape.block_size)).pin_memory()
        wrappers = {name: window.mixed for name, window in self._windows.items()}
        return FlashInferPlan(where.to(self.device, non_blocking=True), wrappers)

    def attend(self, layer: int, q: torch.Tensor, plan: FlashInferPlan) -> torch.Tensor:
        """See :meth:`AttentionBackend.attend`."""
        out: torch.Tensor = plan.wrappers[self.shape.window(layer)].run(q, self._pages[layer])
        return out.flatten(1)

    def capture_plan(
        self, where: torch.Tensor, starts: torch.Tensor, pages: torch.Tensor, last: torch.Tensor
    ) -> FlashInferPlan:
        """A plan of decode steps of ``len(last)`` sequences, to be captured.

        Its tables are buffers of the device, filled before each replay; ``pages`` is as long as it can get.
        """
        rows = len(last)
        for window in self._windows.values():
            if rows in window.decodes:
                continue
            wrapper = window.decodes[rows] = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,  # on an H200 1.2 times as fast with 32 sequences, twice with 8
                paged_kv_indptr_buffer=starts,
                paged_kv_indices_buffer=pages,
                paged_kv_last_page_len_buffer=last,
            )
            sizes = torch.ones(rows, dtype=torch.int32)
            # The planner of every step takes its kernels from this first, full one.
            self._plan_decode(window, wrapper.plan, wrapper, torch.arange(rows + 1, dtype=torch.int32), sizes, sizes)
        return FlashInferPlan(where, {name: window.decodes[rows] for name, window in self._windows.items()})

    def plan_decode(self, rows: int, tables: PagedTables) -> None:
        """Prepare a replay: how the work is split, which follows from lengths. The caller has filled the tables."""
        starts, pages, last = (torch.from_numpy(part) for part in (tables.starts, tables.pages, tables.last))
        for window in self._windows.values():
            wrapper = window.decodes[rows]
            plan = fast_decode_plan.__get__(wrapper)
            self._plan_decode(window, plan, wrapper, starts, pages, last, global_override_indptr_cpu=starts)

    def _plan_decode(
        self,
        window: _Window,
        plan: Any,
        wrapper: Any,
        starts: torch.Tensor,
        pages: torch.Tensor,
        last: torch.Tensor,
        **options: torch.Tensor,
    ) -> None:
        shape = self.shape
        window.prepare(wrapper)
        plan(
            starts,
            pages,
            last,
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


def _prefill_backend(device: torch.device) -> str:
    """Hopper has kernels of its own, with its asynchronous copies and tensor cores."""
    return "fa3" if torch.cuda.get_device_capability(device)[0] == 9 else "fa2"
