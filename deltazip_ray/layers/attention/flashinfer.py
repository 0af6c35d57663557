"""Paged attention on NVIDIA GPUs: prefills by FlashInfer, decodes by our own kernels."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flashinfer
import numpy as np
import torch

from deltazip_ray.layers.attention.backend import SequenceRows
from deltazip_ray.layers.attention.cache import CacheShape
from deltazip_ray.layers.attention.paged import PagedDecodes
from deltazip_ray.layers.attention.tables import page_tables

_WORKSPACE = 256 << 20
_INTEGERS = 8 << 20


@dataclass(frozen=True)
class Prefills:
    """Those of a step."""

    rows: slice
    """From the first of theirs to the last one."""
    wrappers: Mapping[int | None, Any]
    """By window of a layer; FlashInfer's own plans are inside."""


class _Window:
    """Prefills of layers of one window."""

    def __init__(self, window: int | None, workspace: torch.Tensor) -> None:
        device = workspace.device
        self.left = -1 if window is None else window - 1
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=_hopper(device))
        self._integers = torch.empty(_INTEGERS, dtype=torch.uint8, device=device)
        # A plan is copied from page-locked memory when the device comes to it. At most one step is launched ahead, so
        # with two of them in turn none is overwritten before it was read.
        self._staged = [torch.empty(_INTEGERS, dtype=torch.uint8, pin_memory=True) for _ in range(2)]

    def prepare(self) -> Any:
        """Its wrapper, about to plan."""
        self._staged.reverse()
        self.wrapper._int_workspace_buffer = self._integers
        self.wrapper._pin_memory_int_workspace_buffer = self._staged[0]
        return self.wrapper


class FlashInferBackend(PagedDecodes[Prefills]):
    """Hopper has prefill kernels of its own in FlashInfer, twice as fast as ours."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device, *, decodes: int) -> None:
        """Takes memory for workspaces. FlashInfer compiles its kernels at the first use of a head size and type."""
        super().__init__(shape, dtype, device, decodes=decodes)
        workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
        self._wrappers = {window: _Window(window, workspace) for window in self.windows}

    def plan_prefills(self, sequences: Sequence[SequenceRows], rows: np.ndarray) -> Prefills:
        """See :meth:`PagedDecodes.plan_prefills`."""
        shape = self.shape
        sequences = self._without_gaps(sequences, rows)
        tables = page_tables(sequences, shape.block_size)
        starts = np.cumsum([0, *(sequence.queries for sequence in sequences)])
        for window in self._wrappers.values():
            window.prepare().plan(
                torch.from_numpy(starts.astype(np.int32)),
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
        first = int(rows[0])
        wrappers = {name: window.wrapper for name, window in self._wrappers.items()}
        return Prefills(slice(first, first + int(starts[-1])), wrappers)

    def _without_gaps(self, sequences: Sequence[SequenceRows], rows: np.ndarray) -> Sequence[SequenceRows]:
        """FlashInfer wants rows that lie together: decodes between prefills become sequences of the padding block.

        What comes out for these is overwritten by their own kernels, later.
        """
        filled: list[SequenceRows] = []
        end = int(rows[0])
        for sequence, row in zip(sequences, rows.tolist(), strict=True):
            if row > end:
                gap = row - end
                filled.append(SequenceRows(gap, gap, array("i", [self.padding]) * -(-gap // self.shape.block_size)))
            filled.append(sequence)
            end = row + sequence.queries
        return filled

    def attend_prefills(self, layer: int, q: torch.Tensor, plan: Prefills, out: torch.Tensor) -> None:
        """See :meth:`PagedDecodes.attend_prefills`."""
        wrapper, pages = plan.wrappers[self.shape.window(layer)], (self.layers[layer].keys, self.layers[layer].values)
        wrapper.run(q[plan.rows], pages, out=out[plan.rows])


def _hopper(device: torch.device) -> str:
    """Which of its kernels: Hopper has some with its asynchronous copies and tensor cores."""
    return "fa3" if torch.cuda.get_device_capability(device)[0] == 9 else "fa2"
