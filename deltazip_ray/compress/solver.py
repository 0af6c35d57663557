"""Codes for one delta matrix that keep its outputs: GPTQ with group scales, SparseGPT for 2:4.

Columns are coded in order; the error of each is spread over the columns that are still open so that the output on the
calibration inputs changes least (arXiv 2210.17323, 2301.00774). Rows are independent of each other.
"""

import torch
from torch import Tensor

from deltazip_kernels.layout import GROUP, Codec
from deltazip_ray.compress.grid import Coded, choose_scales, keep_two_of_four, round_to_nearest, to_codes
from deltazip_ray.compress.hessian import inverse_factor

ROWS = 16384
"""Rows coded at a time; bounds the memory that a head of many tokens takes."""


class Solver:
    """Codes matrices whose inputs have one Hessian, float64 ``[K, K]``, ``damped``: it is factorized once.

    Compensation is greedy and may lose to plain rounding on single rows; those rows are rounded, so that no row's
    error in the norm of the damped Hessian is larger than by :func:`round_to_nearest`.
    """

    def __init__(self, damped: Tensor) -> None:
        self._factor, self._metric = inverse_factor(damped), damped.float()

    def solve(self, delta: Tensor, codec: Codec) -> Coded:
        """Code ``delta`` float32 ``[N, K]``."""
        pieces = torch.split(delta, ROWS)
        return Coded.join([_solve_rows(rows, self._factor, self._metric, codec) for rows in pieces])


def _solve_rows(delta: Tensor, factor: Tensor, metric: Tensor, codec: Codec) -> Coded:
    nearest = round_to_nearest(delta, metric.diagonal(), codec)
    compensated = compensate(delta, factor, codec)
    better = _row_errors(delta, compensated, metric, codec) < _row_errors(delta, nearest, metric, codec)
    return _by_row(better[:, None], compensated, nearest)


def compensate(delta: Tensor, factor: Tensor, codec: Codec) -> Coded:
    """Code the columns of ``delta`` ``[N, K]`` in order; ``factor`` is :func:`inverse_factor` of the Hessian."""
    work = delta.clone()
    codes = torch.zeros_like(delta, dtype=torch.uint8)
    kept = torch.ones_like(delta, dtype=torch.bool) if codec.sparse else None
    scales = []
    for start in range(0, delta.shape[1], GROUP):
        end = min(start + GROUP, delta.shape[1])
        part = None if kept is None else kept[:, start:end]
        group_scales, errors = _group(
            work[:, start:end], codes[:, start:end], part, factor[start:end, start:end], codec
        )
        scales.append(group_scales)
        work[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return Coded(codes, torch.stack(scales, 1), kept)


def _group(work: Tensor, codes: Tensor, kept: Tensor | None, factor: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Code one group in place; returns its scales ``[N]`` and the errors ``[N, columns]`` to spread over later groups.

    A column's error costs ``(error / factor_jj)²`` once the later columns have compensated for it: the weight of
    scales and, with the whole value as error, the saliency of SparseGPT.
    """
    cost = factor.diagonal().square().reciprocal()
    # The mask is settled four by four below; until then the scales take what it would be now.
    likely = work.new_ones(()) if kept is None else keep_two_of_four(work.square() * cost)
    scales = choose_scales(work, cost * likely, codec)
    errors = torch.zeros_like(work)
    for j in range(work.shape[1]):
        if kept is not None and j % 4 == 0:
            kept[:, j : j + 4] = keep_two_of_four(work[:, j : j + 4].square() * cost[j : j + 4])
        column = work[:, j]
        code = to_codes(column, scales, codec)
        value = (code - codec.zero) * scales
        if kept is not None:
            value = value * kept[:, j]
        codes[:, j] = code
        errors[:, j] = (column - value) / factor[j, j]
        work[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1)
    return scales, errors


def _row_errors(delta: Tensor, coded: Coded, metric: Tensor, codec: Codec) -> Tensor:
    """Squared error of each row in the norm of ``metric``."""
    error = delta - coded.dequantized(codec)
    return ((error @ metric) * error).sum(1)


def _by_row(first: Tensor, left: Coded, right: Coded) -> Coded:
    """Rows of ``left`` where ``first`` ``[N, 1]``, else of ``right``."""
    kept = None if left.kept is None or right.kept is None else torch.where(first, left.kept, right.kept)
    return Coded(torch.where(first, left.codes, right.codes), torch.where(first, left.scales, right.scales), kept)
