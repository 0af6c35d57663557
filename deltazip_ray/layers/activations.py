"""The operands of a linear layer: activations and the base's weight."""

from dataclasses import dataclass

import torch

from deltazip_kernels.fp8 import Fp8Matrix
from deltazip_kernels.quantize import QuantizedRows

BaseWeight = torch.Tensor | Fp8Matrix
"""``[N, K]``."""


@dataclass(frozen=True)
class Activations:
    """Rows ``[rows, K]``, also rounded to int8 (and fp8) if the layer before did that."""

    values: torch.Tensor
    rounded: QuantizedRows | None = None


def dense(weight: BaseWeight, dtype: torch.dtype) -> torch.Tensor:
    """``weight`` as an ordinary tensor; fp8 is converted to ``dtype``."""
    return weight.dequantize(dtype) if isinstance(weight, Fp8Matrix) else weight


def weight_rows(weight: BaseWeight, start: int, stop: int) -> BaseWeight:
    """A view of some rows of ``weight``."""
    return weight.rows(start, stop) if isinstance(weight, Fp8Matrix) else weight[start:stop]
