"""The operations that differ between devices, here in plain torch, which runs everywhere."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from deltazip_kernels.fp8 import Fp8Matrix, fp8_matmul_torch, round_to_fp8
from deltazip_kernels.rope import HeadNorm
from deltazip_ray.layers.activations import Activations, BaseWeight
from deltazip_ray.layers.attention.cache import KVLayer
from deltazip_ray.layers.rope import Rotary
from deltazip_ray.layers.rows import Rows, join_runs, send_index, send_segments
from deltazip_ray.layers.stack import DeltaStack


class LayerOps:
    """Computes in float32 or in the dtype of the weights. May wait for the device to read segments."""

    def stack(self, shapes: Sequence[tuple[int, int]], slots: int) -> DeltaStack:
        """A container for the deltas of linears of ``shapes`` that share their input."""
        return DeltaStack(shapes, slots)

    def rows(self, runs: Sequence[tuple[int, int]], device: torch.device) -> Rows:
        """Rows from ``(slot, rows)`` runs in batch order; runs of the same slot must be adjacent."""
        spans = join_runs(runs)
        versions = tuple(span for span in spans if span.slot >= 0)
        return Rows(send_index(spans, device), versions, send_segments(spans, device))

    def linear(self, weight: BaseWeight, x: Activations, stack: DeltaStack, rows: Rows) -> torch.Tensor:
        """``x W^T`` of the base plus the deltas. If the weight is in fp8, ``x`` is rounded to fp8 for the base."""
        if isinstance(weight, Fp8Matrix):
            y = fp8_matmul_torch(round_to_fp8(x.values), weight, x.values.dtype)
        else:
            y = F.linear(x.values, weight)
        stack.add_product(y, x, rows)
        return y

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
        """RMS norm of ``x`` ``[rows, K]``, times ``weights[rows.index]``; ``update`` is added to ``x`` in place first.

        With ``offset`` the factor is one plus the weight, and the product is rounded once (Gemma).
        """
        if update is not None:
            x += update
        weight = weights[rows.index] if rows.spans else weights[0]
        if offset:
            return Activations((F.rms_norm(x.float(), (x.shape[-1],), None, eps) * (1 + weight.float())).to(x.dtype))
        return Activations(F.rms_norm(x, (x.shape[-1],), None, eps) * weight)

    def layer_norm(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        biases: torch.Tensor,
        rows: Rows,
        eps: float,
        update: torch.Tensor | None = None,
    ) -> Activations:
        """Layer norm of ``x``, likewise, plus ``biases[rows.index]``; rounded once."""
        if update is not None:
            x += update
        normed = F.layer_norm(x.float(), (x.shape[-1],), None, None, eps)
        weight, bias = weights[rows.index].float(), biases[rows.index].float()
        return Activations((normed * weight + bias).to(x.dtype))

    def silu_mul(self, gate_up: torch.Tensor, rows: Rows) -> Activations:
        """``silu(gate) * up`` of ``[rows, 2 K]``."""
        gate, up = gate_up.chunk(2, dim=-1)
        return Activations(F.silu(gate) * up)

    def gelu_mul(self, gate_up: torch.Tensor, rows: Rows) -> Activations:
        """The same with the tanh approximation of gelu."""
        gate, up = gate_up.chunk(2, dim=-1)
        return Activations(F.gelu(gate, approximate="tanh") * up)

    def rotate(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rotary: Rotary,
        cache: KVLayer,
        where: torch.Tensor,
        norm: HeadNorm | None = None,
    ) -> torch.Tensor:
        """Rotated ``q`` ``[rows, heads, head_dim]``; keys, rotated, and values go to positions ``where`` of the cache.

        With ``norm`` the heads of ``q`` and ``k`` are normed before.
        """
        groups, dim = cache.keys.shape[2:]
        q, k, v = qkv.view(len(qkv), -1, dim).split([qkv.shape[1] // dim - 2 * groups, groups, groups], dim=1)
        if norm is not None:
            q, k = (
                F.rms_norm(x, (dim,), None, norm.epsilon) * weights[norm.which, None]
                for x, weights in ((q, norm.q), (k, norm.k))
            )
        tables = rotary.select(positions)
        cache.write(where, rotary(k, tables), v)
        return rotary(q, tables)
