"""The shapes of recorded steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltazip_kernels.plan import MORE, SOME, in_halves

_SMALL, _FINE, _COARSE = (1, 2, 4, 8, 16, 32, 64), 32, 256
"""Rows of graphs: these, then every ``_FINE`` up to ``_COARSE``, then every 64. Up to 64, where a step is all reading,
a row too many costs next to nothing; a size more is one recording more for each number of versions."""


@dataclass(frozen=True)
class StepShape:
    """The parameters of a step's launches; a batch runs in a graph that is at least as large in each."""

    rows: int
    versions: int
    """0: the base alone."""
    longest: int
    """Maximum rows of one version."""
    arriving: bool
    """Whether a version is still being copied; then each layer is a graph of its own."""
    halves: bool = False
    """Whether some versions have more rows than one work item: see ``in_halves``."""

    @classmethod
    def of(cls, rows: int, lengths: Sequence[int], slots: int, *, arriving: bool) -> "StepShape":
        """The smallest recorded shape for versions with ``lengths`` rows."""
        if not lengths:
            return cls(rows, 0, 0, arriving=arriving)
        versions = min(1 << (len(lengths) - 1).bit_length(), rows, slots)
        if in_halves(lengths):
            return cls(rows, versions, 2 * MORE, halves=True, arriving=arriving)
        return cls(rows, versions, next(n for n in (SOME, MORE, rows) if n >= max(lengths)), arriving=arriving)


def step_sizes(most: int) -> tuple[int, ...]:
    """Numbers of rows of the graphs for batches of up to ``most`` rows."""
    sizes = [*_SMALL, *range(_SMALL[-1] + _FINE, _COARSE, _FINE), *range(_COARSE, most, 64)]
    return (*(size for size in sizes if size < most), most)


def mixtures(rows: int, versions: int) -> list[tuple[int, ...]]:
    """Rows of each version in example steps of ``rows`` rows that together need all recordings of that size."""
    most = rows - versions + 1
    longest = sorted({min(length, most) for length in (SOME, MORE, 2 * MORE, rows)})
    return [(length, *[1] * (versions - 1)) for length in longest]


def numbers_of_versions(most: int) -> list[int]:
    """The recorded numbers of versions: 1, 2, 4 … and ``most``."""
    return sorted({min(1 << i, most) for i in range(most.bit_length() + 1)} - {0})
