"""Norms with separate weights for each version."""

from typing import Protocol

import torch

from deltazip_kernels.rope import HeadNorm
from deltazip_ray.layers.activations import Activations
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.targets import VectorTarget


class Norm(Protocol):
    """A norm over whole rows."""

    def __call__(self, x: torch.Tensor, rows: Rows, update: torch.Tensor | None = None) -> Activations:
        """Add ``update`` to ``x`` ``[rows, hidden]`` in place, and norm the sum; means are computed in float32."""
        ...


class DeltaRMSNorm:
    """Scales rows to unit root mean square, then by the weight of the row's version."""

    def __init__(self, target: VectorTarget, eps: float, ops: LayerOps, *, offset: bool = False) -> None:
        """With ``offset`` the factor is 1 + weight."""
        self.target = target
        self.eps = eps
        self.ops = ops
        self.offset = offset

    def __call__(self, x: torch.Tensor, rows: Rows, update: torch.Tensor | None = None) -> Activations:
        """See :class:`Norm`."""
        return self.ops.rms_norm(x, self.target.table, rows, self.eps, update, offset=self.offset)


class DeltaLayerNorm:
    """Shifts rows to mean 0 and scales them to variance 1, then applies weight and bias of the row's version."""

    def __init__(self, weight: VectorTarget, bias: VectorTarget, eps: float, ops: LayerOps) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self.ops = ops

    def __call__(self, x: torch.Tensor, rows: Rows, update: torch.Tensor | None = None) -> Activations:
        """See :class:`Norm`."""
        return self.ops.layer_norm(x, self.weight.table, self.bias.table, rows, self.eps, update)


class DeltaHeadNorm:
    """RMS norms of each head of q and k, computed together with the rotation."""

    def __init__(self, q: VectorTarget, k: VectorTarget, eps: float) -> None:
        self.q = q
        self.k = k
        self.eps = eps

    def of(self, rows: Rows) -> HeadNorm:
        """The weights of the versions of ``rows``."""
        return HeadNorm(self.q.table, self.k.table, rows.index, self.eps)
