"""A linear layer whose rows may belong to different versions."""

import torch

from deltazip_ray.layers.activations import Activations, BaseWeight
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.stack import DeltaStack


class DeltaLinear:
    """``x W^T + b`` of the base in one product over all rows, plus the deltas of each row's version.

    ``weight`` ``[out, in]`` may be several checkpoint matrices, stacked (q|k|v, gate|up).
    """

    def __init__(
        self, weight: BaseWeight, stack: DeltaStack, ops: LayerOps, biases: torch.Tensor | None = None
    ) -> None:
        """``biases`` ``[slots + 1, out]``; row 0 is the base's."""
        self.weight = weight
        self.stack = stack
        self.ops = ops
        self.biases = biases

    def __call__(self, x: Activations, rows: Rows) -> torch.Tensor:
        """``x`` ``[rows, in]`` to ``[rows, out]``."""
        y = self.ops.linear(self.weight, x, self.stack, rows)
        if self.biases is not None:
            y += self.biases[rows.index]
        return y
