"""The operations of ``ops.py`` as fused kernels for a GPU.

The number of launches does not depend on how many versions share the batch, so a step can be captured in a graph.
"""

import math
import threading
from collections.abc import Sequence, Set

import torch

from deltazip_kernels import CODECS, LOW_RANK, RAW, PackedDelta, Segments
from deltazip_kernels.fp8 import Fp8Matrix
from deltazip_kernels.fused import FusedProduct
from deltazip_kernels.gather import gather_rows
from deltazip_kernels.merged import merge_weight
from deltazip_kernels.plan import plan
from deltazip_kernels.quantize import (
    gelu_mul_quantize,
    layer_norm_quantize,
    quantize_rows,
    rms_norm_quantize,
    silu_mul_quantize,
)
from deltazip_kernels.rope import HeadNorm, rope_and_cache
from deltazip_kernels.skinny import BaseProduct
from deltazip_kernels.table import CODEC_IDS, DeltaTable
from deltazip_kernels.triton_backend import grouped_matmul, low_rank_matmul, raw_matmul
from deltazip_ray.layers.activations import Activations, BaseWeight, dense, weight_rows
from deltazip_ray.layers.attention.cache import KVLayer
from deltazip_ray.layers.long_segments import LongSegments
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.layers.rope import Rotary
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.stack import DeltaStack
from deltazip_ray.layers.writes import Writes

FIRST_ROWS = 32
"""Up to this many rows the deltas' product runs before the base's (decision 026). With more, steps were slower on an
H200."""


def ordered(codecs: Set[str]) -> tuple[str, ...]:
    """``codecs`` in a fixed order: kernels are compiled for a sequence of codecs."""
    return tuple(name for name in CODEC_IDS if name in codecs)


class TritonStack(DeltaStack):
    """Deltas that kernels reach through a table of pointers in device memory."""

    def __init__(self, shapes: Sequence[tuple[int, int]], slots: int, ops: "TritonOps") -> None:
        super().__init__(shapes, slots)
        self.ops = ops
        self.table = DeltaTable(shapes, slots, ops.device, ops.dtype)
        self.groups: tuple[tuple[str, ...], ...] = ()
        """All codecs that any slot has held so far. There is one launch for each group."""
        self.rank = 0
        """The largest rank of any low-rank delta so far."""

    @property
    def codecs(self) -> set[str]:
        """The codecs of all groups."""
        return {name for group in self.groups for name in group}

    def put(self, slot: int, part: int, delta: PackedDelta | None, writes: Writes) -> None:
        """See :meth:`DeltaStack.put`; steps launched after ``writes`` see the delta."""
        self.ops.segments.replace(slot, self.deltas[part][slot], delta)
        super().put(slot, part, delta, writes)
        writes.put(self.table.rows[slot][part], self.table.hold(slot, part, delta))
        if delta is None:
            return
        self.grow({delta.codec}, delta.tensors["down"].shape[0] if delta.codec == LOW_RANK else 0)

    def grow(self, codecs: Set[str], rank: int) -> None:
        """Make later steps serve ``codecs`` too, and low-rank deltas up to ``rank``.

        New codecs get a launch of their own.
        """
        with self.ops.growth:
            new = codecs - self.codecs
            if new or rank > self.rank:
                self.groups += (ordered(new),) if new else ()
                self.rank = max(self.rank, rank)
                self.ops.generation += 1

    def join(self, codecs: Set[str]) -> None:
        """Make later steps serve ``codecs``, which several groups have now, in one launch."""
        with self.ops.growth:
            others = (group for group in self.groups if not {*group} <= codecs)
            self.groups = (ordered(codecs), *others)
            self.ops.generation += 1

    def add_product(self, y: torch.Tensor, x: Activations, rows: Rows, *, first: bool = False) -> None:
        """See :meth:`DeltaStack.add_product`; only for ``rows.work``. Packed codecs see ``x`` rounded to int8.

        ``first``: this runs right after the launch that made ``x``, with no GEMM between.
        """
        if rows.work is None:
            return
        rounded = x.rounded
        for group in self.groups:
            packed = [name for name in group if name in CODECS]
            if packed and rounded is None:
                rounded = quantize_rows(x.values, int8=rows.rounded)
            if packed and rounded is not None:
                grouped_matmul(y, rounded, self.table, rows.work, packed, starts_early=first)
            if RAW in group:
                raw_matmul(y, x.values, self.table, rows.work)
            if LOW_RANK in group:
                low_rank_matmul(y, x.values, self.table, rows.work, self.rank)

    def add_weights(self, hidden: torch.Tensor, chosen: torch.Tensor, rows: Rows) -> None:
        """See :meth:`DeltaStack.add_weights`."""
        for group in self.groups:
            gather_rows(hidden, chosen, rows.index, self.table, group)

    def merged(self, weight: BaseWeight, slot: int) -> BaseWeight:
        """``weight`` plus the slot's deltas, in scratch memory that the next call for any stack overwrites."""
        if all(deltas[slot] is None for deltas in self.deltas):
            return weight
        scratch = self.ops.scratch(weight)
        for deltas, start, stop in zip(self.deltas, self.starts, self.starts[1:], strict=False):
            delta, part = deltas[slot], weight_rows(weight, start, stop)
            if delta is None:
                scratch[start:stop].copy_(dense(part, scratch.dtype))
            else:
                merge_weight(part, delta, scratch[start:stop])
        return scratch


class TritonOps(LayerOps):
    """Rounds activations to int8 for packed deltas. One object belongs to one stream: launches share its buffers."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> None:
        """``fp8``: the base's weights are in fp8, so activations are rounded to fp8 as well as to int8."""
        self.device = device
        self.dtype = dtype
        self.fp8 = fp8
        self.generation = 0
        """Counts changes of the launches: graphs captured before a change are outdated."""
        self.growth = threading.Lock()
        """Guards ``generation`` and the stacks' ``groups`` and ``rank`` against loads in several threads."""
        self._scratch = torch.empty(0, dtype=dtype, device=device)
        self.product = BaseProduct(device)
        self.deltas = torch.empty(0, dtype=dtype, device=device)
        """Passes products with deltas on to the base's product, which clears it: all zeros between two linears."""
        self.fused = FusedProduct(device)
        self.segments = LongSegments(fused=self.fused.available and dtype == torch.bfloat16 and not fp8)

    def scratch(self, like: BaseWeight) -> torch.Tensor:
        """Uninitialized memory for one weight of the shape of ``like``; all calls return the same memory."""
        size = math.prod(like.shape)
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._scratch[:size].view(like.shape)

    def stack(self, shapes: Sequence[tuple[int, int]], slots: int) -> TritonStack:
        """See :meth:`LayerOps.stack`."""
        size = FIRST_ROWS * sum(outputs for outputs, _ in shapes)
        if self.deltas.numel() < size:
            self.deltas = torch.zeros(size, dtype=self.dtype, device=self.device)
        return TritonStack(shapes, slots, self)

    def rows(self, runs: Sequence[tuple[int, int]], device: torch.device) -> Rows:
        """See :meth:`LayerOps.rows`."""
        return self.segments.rows(runs, device)

    def graph_rows(self, index: torch.Tensor, segments: Segments, longest: int, *, halves: bool = False) -> Rows:
        """Rows of a captured step, whose ``index`` and ``segments`` may change between replays.

        No segment may get more than ``longest`` rows. ``halves``: see :func:`~deltazip_kernels.plan.plan`.
        """
        return Rows(index, work=plan(segments, len(index), longest, halves=halves), rounded=len(index))

    def linear(self, weight: BaseWeight, x: Activations, stack: DeltaStack, rows: Rows) -> torch.Tensor:
        """See :meth:`LayerOps.linear`."""
        if not isinstance(stack, TritonStack):
            raise TypeError("TritonOps multiply with the stacks that they made")
        if isinstance(weight, Fp8Matrix) and x.rounded is None:
            x = Activations(x.values, quantize_rows(x.values, fp8=True, int8=rows.rounded))
        y = x.values.new_empty((x.values.shape[0], weight.shape[0]))
        few = len(y) <= FIRST_ROWS and rows.work is not None and not rows.merged
        if few and stack.groups and self.product.cut(_seen(x, weight), weight):
            self._multiply_deltas_first(y, x, rows, weight, stack)
            return y
        for start, stop in rows.short_runs():
            self._multiply(y[start:stop], x, start, weight)
        self._multiply_long(y, x, rows, weight, stack)
        stack.add_product(y, x, rows)
        return y

    def _multiply_deltas_first(
        self, y: torch.Tensor, x: Activations, rows: Rows, weight: BaseWeight, stack: TritonStack
    ) -> None:
        """Write ``y`` ``[rows, N]``: the deltas' product goes to a buffer that the base's product adds."""
        deltas = self.deltas[: y.numel()].view(y.shape)
        try:
            stack.add_product(deltas, x, rows, first=True)
            self._multiply(y, x, 0, weight, deltas)
        except BaseException:
            deltas.zero_()  # the engine survives a failed step, and the next one must not add its leftovers
            raise

    def _multiply_long(
        self, y: torch.Tensor, x: Activations, rows: Rows, weight: BaseWeight, stack: TritonStack
    ) -> None:
        """Write the rows of long segments of ``y`` ``[rows, N]``."""
        done = self.fused(y, x.values, weight, stack.table, rows.tiles) if rows.tiles else set()
        for span in rows.merged:
            if span.slot not in done:
                self._multiply(y[span.start : span.stop], x, span.start, stack.merged(weight, span.slot))

    def _multiply(
        self, y: torch.Tensor, x: Activations, start: int, weight: BaseWeight, deltas: torch.Tensor | None = None
    ) -> None:
        """Write ``y`` ``[rows, N]``: the rows of ``x`` from ``start`` on times ``weight``, plus ``deltas``."""
        stop = start + y.shape[0]
        if start < stop:
            self.product(y, weight_rows(_seen(x, weight), start, stop), weight, deltas)

    def rms_norm(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        rows: Rows,
        eps: float,
        update: torch.Tensor | None = None,
        *,
        offset: bool = False,
    ) -> Activations:
        """See :meth:`LayerOps.rms_norm`."""
        first, residual = (x, None) if update is None else (update, x)
        return Activations(
            *rms_norm_quantize(
                first, weights, rows.index, eps, residual, offset=offset, fp8=self.fp8, int8=rows.rounded
            )
        )

    def layer_norm(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        biases: torch.Tensor,
        rows: Rows,
        eps: float,
        update: torch.Tensor | None = None,
    ) -> Activations:
        """See :meth:`LayerOps.layer_norm`."""
        first, residual = (x, None) if update is None else (update, x)
        return Activations(
            *layer_norm_quantize(first, weights, biases, rows.index, eps, residual, fp8=self.fp8, int8=rows.rounded)
        )

    def silu_mul(self, gate_up: torch.Tensor, rows: Rows) -> Activations:
        """See :meth:`LayerOps.silu_mul`."""
        return Activations(*silu_mul_quantize(gate_up, fp8=self.fp8, int8=rows.rounded))

    def gelu_mul(self, gate_up: torch.Tensor, rows: Rows) -> Activations:
        """See :meth:`LayerOps.gelu_mul`."""
        return Activations(*gelu_mul_quantize(gate_up, fp8=self.fp8, int8=rows.rounded))

    def rotate(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rotary: Rotary,
        cache: KVLayer,
        where: torch.Tensor,
        norm: HeadNorm | None = None,
    ) -> torch.Tensor:
        """See :meth:`LayerOps.rotate`."""
        return rope_and_cache(qkv, positions, rotary.tables, cache.keys, cache.values, where, norm, cache.scales)


def _seen(x: Activations, weight: BaseWeight) -> torch.Tensor | Fp8Matrix:
    """``x`` in the type that ``weight`` is multiplied with."""
    if isinstance(weight, torch.Tensor):
        return x.values
    if x.rounded is None or x.rounded.fp8 is None:
        raise ValueError("a base in fp8 takes activations in fp8: make these operations with fp8=True")
    return x.rounded.fp8
