"""The errors of all codings of one delta, and their products with gradients."""

import torch
from torch import Tensor

from deltazip_ray.compress.coding import LADDER, Encode, attempt
from deltazip_ray.compress.options import Coding

TRIED = LADDER[:-1]
"""All codings except raw, which has no error."""


class Trials:
    """The errors of all codings of a delta ``[N, K]``: ten bytes per weight."""

    def __init__(self, delta: Tensor, encode: Encode) -> None:
        self.lost = {coding: _lost(delta, coding, encode) for coding in TRIED}
        """bfloat16 ``[N, K]``: its rounding is random and averages out in the products."""
        self._products: dict[Coding, list[Tensor]] = {coding: [] for coding in TRIED}

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Add the linear's inputs ``[sequences, tokens, K]`` and the gradients with respect to its outputs."""
        for coding, lost in self.lost.items():
            self._products[coding].append(((inputs @ lost.to(inputs.dtype).T) * gradient).sum((1, 2)))

    @property
    def products(self) -> dict[Coding, Tensor]:
        """⟨Γ, E⟩ for each sequence: Γ is the gradient with respect to the weight, E the error of the coding."""
        return {coding: torch.cat(found) for coding, found in self._products.items()}


def _lost(delta: Tensor, coding: Coding, encode: Encode) -> Tensor:
    _, added = attempt(delta, coding, encode)
    return torch.sub(delta, added, out=added).bfloat16()
