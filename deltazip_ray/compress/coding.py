"""Codes single matrices, each with the codec that the plan chooses for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltazip_kernels.delta import MAX_RANK
from deltazip_kernels.layout import CODECS, Codec, packed_bytes
from deltazip_ray.compress.adapter import LowRank
from deltazip_ray.compress.grid import Coded
from deltazip_ray.compress.options import Coding, CompressOptions
from deltazip_ray.errors import CompressionError

LADDER: tuple[Coding, ...] = ("absent", "int1", "int2", "int3", "int4", "raw")
"""The codings to choose from, smallest first. The 2:4 codecs take as many bytes as int2 and int3 and lose more."""
Encode = Callable[[Tensor, Codec], Coded]
"""Codes rows of a delta ``[N, K]``."""


@dataclass(frozen=True)
class Plan:
    """Which codings to try for each matrix."""

    options: CompressOptions
    chosen: Mapping[str, Coding]
    """The result of bit allocation, by weight; empty without a target."""
    products: Mapping[str, LowRank]
    """See :func:`kept_products`."""

    def ladder(self, name: str, uniform: Coding) -> tuple[Coding, ...]:
        """Codings to try for a matrix, smallest first; ``uniform`` is the one to use if no goal is set."""
        if name in self.products:
            return ("low_rank",)
        if name in self.options.codecs:
            return (self.options.codecs[name],)
        if self.options.max_error is not None:
            return LADDER
        return (self.chosen.get(name, uniform),)

    def accepts(self, error: float) -> bool:
        """Whether a relative output error is small enough to stop."""
        return self.options.max_error is None or error <= self.options.max_error


@dataclass(frozen=True)
class Outcome:
    """The result of coding one delta."""

    coding: Coding
    coded: Coded | None
    """None when the delta is absent, raw or of low rank."""
    added: Tensor
    """What the reconstruction adds to the base, float32 ``[N, K]``; the whole delta when it is raw."""
    error: float
    """Relative output error."""
    factors: LowRank | None = None
    """The stored factors; None unless the delta is of low rank."""


def kept_products(products: Mapping[str, LowRank], options: CompressOptions) -> dict[str, LowRank]:
    """The ``products`` to store as they are: those that take fewer bytes than in int4.

    Raises CompressionError when ``options`` ask for low_rank for a weight that has no product, or one of too high rank.
    """
    wanted = {name for name, coding in options.codecs.items() if coding == "low_rank"}
    known = {name: product for name, product in products.items() if product.down.shape[0] <= MAX_RANK}
    odd = sorted(wanted - known.keys())
    if odd:
        raise CompressionError(f"codecs asks for low_rank for {odd[0]}, which has no product of rank up to {MAX_RANK}")
    return {
        name: product
        for name, product in known.items()
        if name in wanted or (name not in options.codecs and product.nbytes < packed_bytes("int4", product.shape))
    }


def attempt(delta: Tensor, coding: Coding, encode: Encode) -> tuple[Coded | None, Tensor]:
    """The codes of ``delta`` ``[N, K]`` and the matrix that they represent."""
    if coding == "absent":
        return None, torch.zeros_like(delta)
    if coding == "raw":
        return None, delta
    coded = encode(delta, CODECS[coding])
    return coded, coded.dequantized(CODECS[coding])


def code(
    name: str, delta: Tensor, plan: Plan, uniform: Coding, encode: Encode, measure: Callable[[Tensor, Tensor], float]
) -> Outcome:
    """Keep ``delta`` ``[N, K]`` as a product if the plan says so, else try its codings until the error is accepted.

    ``name`` is the weight's, ``uniform`` the coding to use if no goal is set. ``measure`` returns the relative output
    error of a reconstruction (the second argument) of the delta (the first).
    """
    if name in plan.products:
        return _as_product(delta, plan.products[name], measure)
    for coding in plan.ladder(name, uniform):
        coded, added = attempt(delta, coding, encode)
        error = measure(delta, added)
        if plan.accepts(error):
            break
    return Outcome(coding, coded, added, error)


def _as_product(delta: Tensor, product: LowRank, measure: Callable[[Tensor, Tensor], float]) -> Outcome:
    stored = product.stored(delta.device)
    added = stored.product()
    return Outcome("low_rank", None, added, measure(delta, added), stored)
