"""The random numbers of draws: each depends only on the seed of its request and its position."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from deltazip_ray.engine.sampling.draw import Draw
from deltazip_ray.layers.staging import to_device

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class RandomRows:
    """How the rows of a batch are drawn, as :func:`deltazip_kernels.pick.pick` takes it."""

    numbers: torch.Tensor
    """``[4, rows]`` float64."""
    points: torch.Tensor
    """``[rows]`` float64."""
    seeds: NDArray[np.uint64]
    """``[rows]``."""

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> "RandomRows":
        """Stage the numbers of all rows."""
        seeds = np.array([one.traits.seed & _MASK for one in draws], dtype=np.uint64)
        columns = np.empty((5, len(draws)))
        columns[:4] = np.array([one.traits.numbers for one in draws]).T
        columns[4] = uniform(seeds, np.array([one.position for one in draws]))
        staged = to_device(columns, device)
        return cls(staged[:4], staged[4], seeds)

    def at(self, positions: NDArray[np.int64]) -> "RandomRows":
        """The same rows at new ``positions`` ``[rows]`` in their requests' outputs."""
        return replace(self, points=to_device(uniform(self.seeds, positions), self.points.device))


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) that are functions of seed and position (splitmix64, 48 bits kept)."""
    steps = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return (_mix(_mix(seeds) + steps) >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64."""
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
