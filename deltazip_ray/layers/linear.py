"""A linear layer whose rows may belong to different versions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from deltazip_kernels import delta_matmul
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.targets import MatrixTarget, VectorTarget


@dataclass(frozen=True)
class Projection:
    """One checkpoint matrix and where its outputs lie in a fused weight: columns ``start:stop`` of the output."""

    target: MatrixTarget
    start: int
    stop: int


class DeltaLinear:
    """``x W^T + b`` for the base in one product over all rows, then each version's deltas on column slices.

    ``weight`` ``[out, in]`` holds several checkpoint matrices one below the other (q|k|v, gate|up).
    """

    def __init__(
        self,
        weight: torch.Tensor,
        projections: Sequence[Projection],
        biases: Sequence[VectorTarget] = (),
        bias_table: torch.Tensor | None = None,
        *,
        backend: str,
    ) -> None:
        """``bias_table`` ``[slots + 1, out]`` is what ``biases`` write to; row 0 is the base's."""
        self.weight = weight
        self.projections = tuple(projections)
        self.biases = tuple(biases)
        self.bias_table = bias_table
        self.backend = backend

    def __call__(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``x`` ``[rows, in]`` to ``[rows, out]``."""
        y = F.linear(x, self.weight)
        for projection in self.projections if rows.spans else ():
            y_part = y[:, projection.start : projection.stop]
            delta_matmul(y_part, x, projection.target.deltas, rows.segments, backend=self.backend)
        if self.bias_table is not None:
            y += self.bias_table[rows.index]
        return y
