"""What the codings that bit allocation may choose lose of one delta, and what the errors of each add up to."""

import torch
from torch import Tensor

from deltazip_ray.compress.coding import LADDER, Encode, attempt
from deltazip_ray.compress.options import Coding

TRIED = LADDER[:-1]
"""All but raw, which loses nothing."""


class Trials:
    """Holds what each coding loses of a delta ``[N, K]``: ten bytes a weight."""

    def __init__(self, delta: Tensor, encode: Encode) -> None:
        self.lost = {coding: _lost(delta, coding, encode) for coding in TRIED}
        """bfloat16 ``[N, K]``, for products: their rounding is no error of the codes, and does not add up."""
        self._products: dict[Coding, list[Tensor]] = {coding: [] for coding in TRIED}

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Take in what goes through the linear: inputs ``[sequences, tokens, K]`` and the gradient by its outputs."""
        for coding, lost in self.lost.items():
            self._products[coding].append(((inputs @ lost.to(inputs.dtype).T) * gradient).sum((1, 2)))

    @property
    def products(self) -> dict[Coding, Tensor]:
        """⟨Γ, E⟩ of each sequence: Γ is its gradient by the weight, E what the coding loses."""
        return {coding: torch.cat(found) for coding, found in self._products.items()}


def _lost(delta: Tensor, coding: Coding, encode: Encode) -> Tensor:
    _, added = attempt(delta, coding, encode)
    return torch.sub(delta, added, out=added).bfloat16()
