"""Random sampling: each row uses a random number that depends only on its seed and its position."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from deltazip_ray.engine.sampling.draw import Draw
from deltazip_ray.engine.sampling.weights import cut_probability, cut_ranks, keep, pick, whole_weights
from deltazip_ray.layers.staging import to_device

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Rows that are sampled in the same way; columns ``[rows, 1]`` on the device."""

    rows: torch.Tensor
    ranked: bool
    """Whether top-k or top-p is on."""
    temperature: torch.Tensor
    point: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    least: torch.Tensor | None
    where: NDArray[np.int64]
    """``[rows]``: ``rows``, on the host."""
    seeds: NDArray[np.uint64]

    def at(self, positions: NDArray[np.int64]) -> "RandomRows":
        """The same rows at new ``positions`` ``[batch]`` in their requests' outputs."""
        points = uniform(self.seeds, positions[self.where])
        return replace(self, point=to_device(points[:, None], self.point.device))

    def draw(self, logits: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        """Sample tokens for these rows of ``logits`` ``[batch, vocab]``, whose maxima are ``top`` ``[batch]``."""
        picked = logits.index_select(0, self.rows)
        weights = whole_weights(picked, top.index_select(0, self.rows)[:, None], self.temperature)
        least = self.least
        if self.ranked:
            cut = cut_ranks(weights, self.top_k, self.top_p)
            least = cut if least is None else torch.maximum(cut, least)
        return pick(weights if least is None else keep(weights, least), self.point)


def random_rows(draws: Sequence[Draw], device: torch.device) -> tuple[RandomRows, ...]:
    """All rows that are not greedy, grouped by the work that they need."""
    groups: dict[tuple[bool, bool], list[int]] = {}
    for row, one in enumerate(draws):
        if one.traits.random is not None:
            groups.setdefault(one.traits.random, []).append(row)
    return tuple(_stage(draws, rows, device, *kind) for kind, rows in groups.items())


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) that are functions of seed and position (splitmix64, 48 bits kept)."""
    steps = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return (_mix(_mix(seeds) + steps) >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _stage(draws: Sequence[Draw], rows: list[int], device: torch.device, ranked: bool, cut: bool) -> RandomRows:
    traits = [draws[row].traits for row in rows]
    seeds = np.array([one.seed & _MASK for one in traits], dtype=np.uint64)
    columns = np.empty((6, len(rows), 1))
    columns[0, :, 0] = rows
    columns[1, :, 0] = uniform(seeds, np.array([draws[row].position for row in rows]))
    columns[2:, :, 0] = np.array([one.numbers for one in traits]).T
    index, point, temperature, top_k, top_p, min_p = to_device(columns, device)
    return RandomRows(
        rows=index[:, 0].long(),
        ranked=ranked,
        temperature=temperature.float(),
        point=point,
        top_k=top_k,
        top_p=top_p,
        least=cut_probability(min_p) if cut else None,
        where=np.array(rows),
        seeds=seeds,
    )


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64."""
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
