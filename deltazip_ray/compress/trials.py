"""One delta in every coding that bit allocation may choose, and what the errors of each add up to."""

from collections.abc import Iterator

import torch
from torch import Tensor

from deltazip_kernels.layout import CODECS
from deltazip_ray.compress.coding import LADDER, Encode
from deltazip_ray.compress.options import Coding

TRIED = LADDER[:-1]
"""All but raw, which loses nothing."""


class Trials:
    """Holds the delta ``[N, K]`` in float32 and a byte a weight for each codec."""

    def __init__(self, delta: Tensor, encode: Encode) -> None:
        self._delta = delta
        self._coded = {coding: encode(delta, CODECS[coding]) for coding in TRIED if coding in CODECS}
        self._products: dict[Coding, list[Tensor]] = {coding: [] for coding in TRIED}

    def lost(self) -> Iterator[tuple[Coding, Tensor]]:
        """What each coding loses of the delta, float32 ``[N, K]``: one at a time."""
        for coding in TRIED:
            if coding in self._coded:
                added = self._coded[coding].dequantized(CODECS[coding])
                yield coding, torch.sub(self._delta, added, out=added)
            else:
                yield coding, self._delta

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Take in what goes through the linear: inputs ``[sequences, tokens, K]`` and the gradient by its outputs."""
        for coding, lost in self.lost():
            self._products[coding].append(((inputs @ lost.T) * gradient).sum((1, 2)))

    @property
    def products(self) -> dict[Coding, Tensor]:
        """⟨Γ, E⟩ of each sequence: Γ is its gradient by the weight, E what the coding loses."""
        return {coding: torch.cat(found) for coding, found in self._products.items()}
