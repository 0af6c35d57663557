"""Codes for one delta matrix that keep its outputs: GPTQ with group scales, SparseGPT for 2:4, then descent.

Columns are coded in order; the error of each is spread over the columns that are still open so that the output on the
calibration inputs changes least (arXiv 2210.17323, 2301.00774). What that settles once, with scales chosen before later
columns were known, is then improved: group by group the best scale for the codes, then code by code the best one while
the others stay (coordinate descent, as QuantEase, arXiv 2309.01885). Rows are independent of each other.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltazip_kernels.layout import GROUP, Codec
from deltazip_ray.compress import grid as torch_grid
from deltazip_ray.compress.grid import Coded
from deltazip_ray.compress.hessian import Factor, inverse_factor
from deltazip_ray.compress.precision import float32_products

SWEEPS = 4
"""Rounds of coordinate descent over all groups; a sixth still takes away some percent of the divergence."""
PIECE = 2**25
"""Numbers of a matrix that are coded at a time: bounds the working memory, a few float32 copies of them."""
PANEL = 1024
"""Columns whose slopes are one product: by single groups it would be too narrow to occupy a GPU."""


class Grid(Protocol):
    """The operations on groups; the contracts are those of the torch bodies in ``grid``."""

    def round_to_nearest(self, delta: Tensor, weights: Tensor, codec: Codec) -> Coded:
        """Code without compensation."""

    def code_group(
        self, work: Tensor, codes: Tensor, kept: Tensor | None, factor: Tensor, codec: Codec
    ) -> tuple[Tensor, Tensor]:
        """Code one group with compensation."""

    def improve_group(
        self, delta: Tensor, lost: Tensor, codes: Tensor, scales: Tensor, slopes: Tensor, metric: Tensor, codec: Codec
    ) -> None:
        """One round of coordinate descent over the scales and codes of one group."""


def grid_for(device: torch.device) -> Grid:
    """The fastest implementation on ``device``."""
    if device.type == "cuda":
        from deltazip_ray.compress import triton_grid  # a host without a GPU need not load a compiler

        return triton_grid
    return torch_grid


def nearest(delta: Tensor, codec: Codec) -> Coded:
    """``delta`` rounded, all columns alike: for lookups, which have no cross terms to compensate with."""
    return grid_for(delta.device).round_to_nearest(delta, torch.ones(delta.shape[1], device=delta.device), codec)


class Solver:
    """Codes matrices whose inputs have one Hessian, ``damped``, ``[K, K]``: it is factorized once for dense codecs.

    Holds ``damped`` itself in float32 and half as much for the factor.

    Compensation is greedy and may lose to plain rounding on single rows; those rows are rounded, so that no row's
    error in the norm of the damped Hessian is larger than by :func:`grid.round_to_nearest`.
    """

    def __init__(self, damped: Tensor, grid: Grid | None = None) -> None:
        self._metric, self._grid = damped.float(), grid

    @float32_products("highest")
    def solve(self, delta: Tensor, codec: Codec) -> Coded:
        """Code ``delta`` float32 ``[N, K]``."""
        order, factor = self._as_stored if codec.sparse else self._by_energy
        grid = self._grid or grid_for(delta.device)
        pieces = []
        for rows in torch.split(delta, max(1, PIECE // delta.shape[1])):
            nearest = grid.round_to_nearest(rows, self._metric.diagonal(), codec)
            compensated, errors = compensate(rows[:, order], factor, codec, grid)
            better = errors < self._squared_errors(rows, nearest, codec)
            coded = _by_row(better[:, None], _reordered(compensated, order), nearest)
            # The 2:4 codecs are kept as published, to compare with.
            pieces.append(coded if codec.sparse else descend(rows, coded, self._metric, codec, grid))
        return Coded.join(pieces)

    def _squared_errors(self, delta: Tensor, coded: Coded, codec: Codec) -> Tensor:
        """Of each row ``[N]``, in the norm of the damped Hessian."""
        lost = coded.dequantized(codec)
        torch.sub(delta, lost, out=lost)
        return (lost @ self._metric).mul_(lost).sum(1)

    @cached_property
    def _by_energy(self) -> tuple[Tensor, Factor]:
        order = coding_order(self._metric.diagonal())
        return order, inverse_factor(self._metric, order)

    @cached_property
    def _as_stored(self) -> tuple[Tensor, Factor]:
        order = torch.arange(len(self._metric), device=self._metric.device)
        return order, inverse_factor(self._metric, order)


def coding_order(energy: Tensor) -> Tensor:
    """The columns ``[K]`` in the order in which they are coded: those with most ``energy`` ``[K]`` first.

    What is coded early finds most columns still open to make up for it (GPTQ's "act order"). Groups stay together and
    have their scales as before, so that what is stored does not change: groups are sorted, and columns inside a group.
    A last group that is not full stays last.
    """
    sums = pad(energy, (0, -len(energy) % GROUP)).view(-1, GROUP).sum(1)
    sums[len(energy) // GROUP :] = -1
    order = energy.argsort(descending=True, stable=True)
    order = order[(order // GROUP).argsort(stable=True)]
    return order[sums[order // GROUP].argsort(descending=True, stable=True)]


def compensate(delta: Tensor, factor: Factor, codec: Codec, grid: Grid = torch_grid) -> tuple[Coded, Tensor]:
    """Code the columns of ``delta`` ``[N, K]``, which is overwritten, from left to right.

    ``factor`` is :func:`inverse_factor` of their Hessian. Also returns each row's squared error ``[N]`` in the norm of
    that Hessian: with e the errors that are spread, the row is off by e · U, and e U H (e U)ᵀ = e eᵀ since Uᵀ U = H⁻¹.
    """
    codes = torch.zeros_like(delta, dtype=torch.uint8)
    kept = torch.ones_like(delta, dtype=torch.bool) if codec.sparse else None
    scales, squared = [], torch.zeros(delta.shape[0], device=delta.device)
    end = 0
    for panel in factor:
        start, end = end, end + len(panel)
        here, later = panel[:, : len(panel)], panel[:, len(panel) :]
        part = None if kept is None else kept[:, start:end]
        group_scales, errors = grid.code_group(delta[:, start:end], codes[:, start:end], part, here, codec)
        scales.append(group_scales)
        squared += errors.square().sum(1)
        delta[:, end:].addmm_(errors, later, alpha=-1)
    return Coded(codes, torch.stack(scales, 1), kept), squared


def descend(delta: Tensor, coded: Coded, metric: Tensor, codec: Codec, grid: Grid = torch_grid) -> Coded:
    """Better scales and codes for ``delta`` ``[N, K]``, found from ``coded``: no step makes a row's error larger.

    ``metric`` ``[K, K]`` is the damped Hessian, in whose norm the error counts.
    """
    codes, scales = coded.codes.clone(), coded.scales.clone()
    lost = coded.dequantized(codec)
    torch.sub(delta, lost, out=lost)
    for _ in range(SWEEPS):
        for panel in _slices(0, delta.shape[1], PANEL):
            slopes = lost @ metric[:, panel]
            for group in _slices(panel.start, panel.stop, GROUP):
                before = lost[:, group].clone()
                grid.improve_group(
                    delta[:, group],
                    lost[:, group],
                    codes[:, group],
                    scales[:, group.start // GROUP],
                    slopes[:, group.start - panel.start : group.stop - panel.start],
                    metric[group, group],
                    codec,
                )
                later = slice(group.stop, panel.stop)
                slopes[:, group.stop - panel.start :].addmm_(lost[:, group] - before, metric[group, later])
    return Coded(codes, scales, None)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """What lies between, in slices of at most ``step``."""
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


def _reordered(coded: Coded, order: Tensor) -> Coded:
    """Columns and groups that are in ``order`` back in their own places."""
    columns, groups = order.argsort(), (order[::GROUP] // GROUP).argsort()
    kept = None if coded.kept is None else coded.kept[:, columns]
    return Coded(coded.codes[:, columns], coded.scales[:, groups], kept)


def _by_row(first: Tensor, left: Coded, right: Coded) -> Coded:
    """Rows of ``left`` where ``first`` ``[N, 1]``, else of ``right``."""
    kept = None if left.kept is None or right.kept is None else torch.where(first, left.kept, right.kept)
    return Coded(torch.where(first, left.codes, right.codes), torch.where(first, left.scales, right.scales), kept)
