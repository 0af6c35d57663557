"""Codes a delta matrix so that its outputs change least: GPTQ with group scales, SparseGPT for 2:4, then descent.

Columns are coded in order, and the error of each is spread over the columns that are not coded yet, so that the output
on the calibration inputs changes least (arXiv 2210.17323, 2301.00774). That pass decides each scale and code once,
before later columns are known. Coordinate descent then improves them: for each group the best scale for its codes, then
the best value of each code while the others stay (QuantEase, arXiv 2309.01885). Rows are independent of each other.
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
"""Rounds of coordinate descent over all groups; even a sixth would still reduce the divergence by some percent."""
PIECE = 2**25
"""Elements of a matrix coded at a time, which limits the working memory to a few float32 copies of them."""
PANEL = 1024
"""Columns whose slopes are computed by one product; a single group is too narrow to occupy a GPU."""


class Grid(Protocol):
    """The operations on groups, as documented in the torch module ``grid``."""

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
        from deltazip_ray.compress import triton_grid  # hosts without a GPU do not need Triton

        return triton_grid
    return torch_grid


def nearest(delta: Tensor, codec: Codec) -> Coded:
    """Round ``delta`` with equal weights for all columns: for lookups, which have no cross terms to compensate with."""
    return grid_for(delta.device).round_to_nearest(delta, torch.ones(delta.shape[1], device=delta.device), codec)


class Solver:
    """Codes matrices whose inputs have the same Hessian ``damped`` ``[K, K]``, which is factorized once.

    Keeps ``damped`` in float32, and half as much for the factor.

    Compensation is greedy and can be worse than plain rounding for single rows. Those rows are rounded instead, so that
    no row's error in the norm of the damped Hessian is larger than with ``grid.round_to_nearest``.
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
            # The 2:4 codecs stay as published, for comparison.
            pieces.append(coded if codec.sparse else descend(rows, coded, self._metric, codec, grid))
        return Coded.join(pieces)

    def _squared_errors(self, delta: Tensor, coded: Coded, codec: Codec) -> Tensor:
        """The error of each row ``[N]`` in the norm of the damped Hessian."""
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
    """The order ``[K]`` in which columns are coded: those with the most ``energy`` ``[K]`` first.

    The error of an early column can be spread over more later ones (GPTQ's "act order"). The stored format does not
    change: groups stay together with their scales; only the order of groups, and of columns inside a group, is sorted.
    An incomplete last group stays last.
    """
    sums = pad(energy, (0, -len(energy) % GROUP)).view(-1, GROUP).sum(1)
    sums[len(energy) // GROUP :] = -1
    order = energy.argsort(descending=True, stable=True)
    order = order[(order // GROUP).argsort(stable=True)]
    return order[sums[order // GROUP].argsort(descending=True, stable=True)]


def compensate(delta: Tensor, factor: Factor, codec: Codec, grid: Grid = torch_grid) -> tuple[Coded, Tensor]:
    """Code the columns of ``delta`` ``[N, K]``, which is overwritten, from left to right.

    ``factor`` is :func:`inverse_factor` of their Hessian. Also returns each row's squared error ``[N]`` in the norm of
    that Hessian: with e the spread errors, the row is off by e · U, and e U H (e U)ᵀ = e eᵀ since Uᵀ U = H⁻¹.
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
    """Improve the scales and codes ``coded`` of ``delta`` ``[N, K]``; no step increases a row's error.

    ``metric`` ``[K, K]`` is the damped Hessian, in whose norm the error is measured.
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
    """The range in slices of at most ``step``."""
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


def _reordered(coded: Coded, order: Tensor) -> Coded:
    """Undo the permutation ``order`` of columns and groups."""
    columns, groups = order.argsort(), (order[::GROUP] // GROUP).argsort()
    kept = None if coded.kept is None else coded.kept[:, columns]
    return Coded(coded.codes[:, columns], coded.scales[:, groups], kept)


def _by_row(first: Tensor, left: Coded, right: Coded) -> Coded:
    """Rows of ``left`` where ``first`` ``[N, 1]``, else of ``right``."""
    kept = None if left.kept is None or right.kept is None else torch.where(first, left.kept, right.kept)
    return Coded(torch.where(first, left.codes, right.codes), torch.where(first, left.scales, right.scales), kept)
