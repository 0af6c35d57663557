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
    """The prefills of a step."""

    rows: slice
    """Their rows, from the first to the last one."""
    wrappers: Mapping[int | None, Any]
    """FlashInfer's wrapper for layers of each window, with its plan inside."""


class _Window:
    """FlashInfer's wrapper for layers of one window, and its staging memory."""

    def __init__(self, window: int | None, workspace: torch.Tensor) -> None:
        device = workspace.device
        self.left = -1 if window is None else window - 1
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=_hopper(device))
        self._integers = torch.empty(_INTEGERS, dtype=torch.uint8, device=device)
        # The device copies a plan from page-locked memory when it reaches the step. At most one step is launched ahead,
        # so with two buffers in turn none is overwritten before it is read.
        self._staged = [torch.empty(_INTEGERS, dtype=torch.uint8, pin_memory=True) for _ in range(2)]

    def prepare(self) -> Any:
        """The wrapper, ready to plan the next step."""
        self._staged.reverse()
        self.wrapper._int_workspace_buffer = self._integers
        self.wrapper._pin_memory_int_workspace_buffer = self._staged[0]
        return self.wrapper


class FlashInferBackend(PagedDecodes[Prefills]):
    """Prefills by FlashInfer, which on Hopper is twice as fast as our kernels."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device, *, decodes: int) -> None:
        """Allocates workspaces. FlashInfer compiles its kernels at the first use of a head size and type."""
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
        """``sequences`` with the rows between them filled in, as FlashInfer wants adjacent rows.

        Decodes there are given to the padding block; their own launch overwrites the result.
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
    """The name of FlashInfer's kernels for this GPU."""
    return "fa3" if torch.cuda.get_device_capability(device)[0] == 9 else "fa2"
