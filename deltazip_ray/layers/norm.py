"""RMS norm with a weight of its own for each version."""

import torch
import torch.nn.functional as F

from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.targets import VectorTarget


class DeltaRMSNorm:
    """Scale rows to unit root mean square, then by the weight of the row's version."""

    def __init__(self, target: VectorTarget, eps: float) -> None:
        self.target = target
        self.eps = eps

    def __call__(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``x`` ``[rows, hidden]``, any float type; the mean is taken in float32."""
        table = self.target.table
        weight = table[rows.index] if rows.spans else table[0]
        return F.rms_norm(x, (x.shape[-1],), None, self.eps) * weight
