"""Codes single matrices, each with the codec that the plan has for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltazip_kernels.layout import CODECS, Codec
from deltazip_ray.compress.grid import Coded
from deltazip_ray.compress.options import Coding, CompressOptions

LADDER: tuple[Coding, ...] = ("absent", "int1", "int2", "int3", "int4", "raw")
"""What there is to choose from, smallest first. The 2:4 codecs take the bytes of int2 and int3 and lose more."""
Encode = Callable[[Tensor, Codec], Coded]
"""Codes for rows of a delta ``[N, K]``."""


@dataclass(frozen=True)
class Plan:
    """Which codings to try for each matrix."""

    options: CompressOptions
    chosen: Mapping[str, Coding]
    """What bit allocation chose, by weight; empty without a target."""

    def ladder(self, name: str, uniform: Coding) -> tuple[Coding, ...]:
        """Codings of the matrix ``name``, smallest first; ``uniform`` is that of its kind without a goal."""
        if name in self.options.codecs:
            return (self.options.codecs[name],)
        if self.options.max_error is not None:
            return LADDER
        return (self.chosen.get(name, uniform),)

    def accepts(self, error: float) -> bool:
        """Whether a relative output error is small enough to stop climbing."""
        return self.options.max_error is None or error <= self.options.max_error


@dataclass(frozen=True)
class Outcome:
    """What became of one delta."""

    coding: Coding
    coded: Coded | None
    """None when the delta is absent or raw."""
    added: Tensor
    """What is added to the base, float32 ``[N, K]``: the whole delta when it is raw."""
    error: float
    """Relative output error."""


def attempt(deltas: Mapping[str, Tensor], coding: Coding, encode: Encode) -> dict[str, tuple[Coded | None, Tensor]]:
    """Code ``deltas`` ``[N, K]`` that share their inputs; for each its codes and what they stand for."""
    if coding == "absent":
        return {name: (None, torch.zeros_like(delta)) for name, delta in deltas.items()}
    if coding == "raw":
        return {name: (None, delta) for name, delta in deltas.items()}
    codec = CODECS[coding]
    first, *others = deltas.values()
    together = encode(torch.cat([first, *others]) if others else first, codec)
    found: dict[str, tuple[Coded | None, Tensor]] = {}
    start = 0
    for name, delta in deltas.items():
        coded = together.rows(slice(start, start := start + delta.shape[0]))
        found[name] = (coded, coded.dequantized(codec))
    return found


def code(
    deltas: Mapping[str, Tensor],
    ladders: Mapping[str, tuple[Coding, ...]],
    plan: Plan,
    encode: Encode,
    measure: Callable[[str, Tensor], float],
) -> dict[str, Outcome]:
    """Climb each delta's ladder until the plan accepts its error, or to its end.

    ``measure`` gives the relative output error of a matrix from what its codes lose.
    """
    done: dict[str, Outcome] = {}
    for step in range(max(map(len, ladders.values()))):
        here = {name: ladders[name][step] for name in deltas if name not in done}
        for coding in sorted(set(here.values())):
            same = {name: deltas[name] for name in here if here[name] == coding}
            for name, (coded, added) in attempt(same, coding, encode).items():
                error = measure(name, deltas[name] - added)
                if plan.accepts(error) or step == len(ladders[name]) - 1:
                    done[name] = Outcome(coding, coded, added, error)
    return done
