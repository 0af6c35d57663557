"""What flows into a linear layer."""

from dataclasses import dataclass

import torch

from deltazip_kernels.quantize import QuantizedRows


@dataclass(frozen=True)
class Activations:
    """Rows ``[rows, K]``, and the same rounded to int8 where the layer that made them did so on the way."""

    values: torch.Tensor
    rounded: QuantizedRows | None = None
