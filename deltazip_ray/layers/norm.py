"""RMS norm with a weight of its own for each version."""

import torch

from deltazip_ray.layers.activations import Activations
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.targets import VectorTarget


class DeltaRMSNorm:
    """Scale rows to unit root mean square, then by the weight of the row's version."""

    def __init__(self, target: VectorTarget, eps: float, ops: LayerOps) -> None:
        self.target = target
        self.eps = eps
        self.ops = ops

    def __call__(self, x: torch.Tensor, rows: Rows, update: torch.Tensor | None = None) -> Activations:
        """Norm ``x`` ``[rows, hidden]``, to which ``update`` is added in place before; the mean is taken in float32."""
        return self.ops.rms_norm(x, self.target.table, rows, self.eps, update)
