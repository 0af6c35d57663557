"""The second-order statistics of a linear's inputs."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltazip_kernels.layout import GROUP
from deltazip_ray.compress.aside import aside
from deltazip_ray.compress.precision import float32_products
from deltazip_ray.errors import CompressionError

PANEL = 1024
"""Columns of a factor computed at a time, in float64: a multiple of the group size."""
PIECE = 2**24
"""Elements of a matrix whose products are in memory at a time."""
JITTER = 1e-6
"""Added to the diagonal of an indefinite matrix at first: more than the rounding error of float32 sums of squares."""


class Hessian:
    """Sum of ``xᵀ x`` over the inputs ``x`` of one linear; half the Hessian of its squared output error."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self._damping = 0.0

    @float32_products("highest")
    def add(self, inputs: Tensor) -> None:
        """Add ``inputs`` ``[tokens, columns]``."""
        inputs = inputs.float()
        self.matrix.addmm_(inputs.T, inputs)

    def check(self, where: str) -> None:
        """Raise CompressionError when some input was not finite, or too large to be squared."""
        # By Cauchy-Schwarz the other elements are finite if the diagonal is.
        if not self.matrix.diagonal().isfinite().all():
            raise CompressionError(
                f"the inputs of {where} overflow on the calibration data: compress with dtype float32 or bfloat16, "
                "and check that the fine-tune itself gives finite outputs"
            )

    def damp(self, damping: float) -> Tensor:
        """Scale the matrix to a mean diagonal of 1 and add ``damping`` to the diagonal. Call it once, after all inputs.

        In place, as this is the largest tensor of all; the result is the matrix itself, positive definite.
        The damping limits how much compensation relies on directions that few calibration tokens span. It also makes
        columns that were never active (zero rows and columns) independent, so that they are rounded to nearest.
        """
        mean = self.matrix.diagonal().double().mean().float()
        if mean > 0:
            self.matrix /= mean
        self.matrix.diagonal().add_(damping)
        self._damping = damping
        return self.matrix

    @float32_products("highest")
    def squared_norm(self, rows: Tensor, less: Tensor | None = None) -> Tensor:
        """``‖x rowᵀ‖²`` summed over the inputs and all of ``rows`` minus ``less`` ``[N, columns]``.

        A scalar, scaled as the matrix is.
        """
        found = torch.zeros((), device=rows.device)
        for at in _pieces(rows):
            part = rows[at] if less is None else rows[at] - less[at]
            products = (part @ self.matrix).sub_(part, alpha=self._damping)
            found += products.mul_(part).sum()
        return found


Factor = tuple[Tensor, ...]
"""An upper triangular matrix ``[K, K]``: for each group its rows, from the group's first column on."""


def inverse_factor(damped: Tensor, order: Tensor) -> Factor:
    """``U`` with ``Uᵀ U = H⁻¹``, float32, where H is ``damped`` ``[K, K]`` with rows and columns in ``order``.

    Row ``i`` is the first row of the inverse Hessian of the columns from ``i`` on, divided by the square root of its
    first element, which is what eliminating the columns in order needs (GPTQ, arXiv 2210.17323, step 3).
    If rounding has made the matrix indefinite, its diagonal is increased until it is positive definite.
    Computed in float64, of which half a matrix and one panel are in memory at a time.
    """
    # With M Mᵀ = H for an upper triangular M (the Cholesky factor of H in reverse order), U = M⁻¹.
    panels = _cholesky(damped, order.flip(0))
    # With it beside the panels, this would be the peak memory of the whole compression.
    with aside(damped):
        return _inverse(panels)


def _inverse(panels: Sequence[Tensor]) -> Factor:
    """The inverse of the lower triangular matrix of these panels, with rows and columns in reverse order."""
    columns = len(panels[0])
    starts = range(0, columns, GROUP)
    factor = tuple(torch.empty(min(GROUP, columns - at), columns - at, device=panels[0].device) for at in starts)
    end = columns
    for first in range(len(panels)):
        begin = end - panels[first].shape[1]
        inverse = _inverse_columns(panels[first:]).flip(0, 1)
        # Rows up to ``end`` of U, its columns from ``begin`` to ``end``.
        for rows, start in zip(factor, starts, strict=True):
            if start < end:
                left = max(start, begin)
                rows[:, left - start : end - start] = inverse[start : start + len(rows), left - begin :]
        end = begin
    return factor


def _pieces(rows: Tensor) -> Iterator[slice]:
    """Rows of at most PIECE numbers."""
    count = max(1, PIECE // rows.shape[1])
    return (slice(start, start + count) for start in range(0, len(rows), count))


def _inverse_columns(lower: Sequence[Tensor]) -> Tensor:
    """The first columns of the inverse of a lower triangular matrix, as many as its first panel has, from the top."""
    rows, columns = lower[0].shape
    found = lower[0].new_zeros(rows, columns)
    found.diagonal().fill_(1)
    start = 0
    for panel in lower:
        width = panel.shape[1]
        here = torch.linalg.solve_triangular(panel[:width], found[start : start + width], upper=False)
        found[start : start + width] = here
        start += width
        found[start:].addmm_(panel[width:], here, alpha=-1)
    return found


def _cholesky(matrix: Tensor, order: Tensor) -> list[Tensor]:
    """Lower Cholesky factor of ``matrix`` with rows and columns in ``order``, float64, in panels of columns.

    Each panel begins at its diagonal; all but the first have PANEL columns. The diagonal of a matrix that is not
    positive definite is increased as little as possible.
    """
    panels, extra = _attempt(matrix, order, 0.0), JITTER
    while panels is None:
        panels, extra = _attempt(matrix, order, extra), 10 * extra
    return panels


def _attempt(matrix: Tensor, order: Tensor, extra: float) -> list[Tensor] | None:
    """:func:`_cholesky` with ``extra`` on the diagonal, or None."""
    panels: list[Tensor] = []
    start = 0
    while start < len(order):
        width = (len(order) - start - 1) % PANEL + 1
        panel = matrix[order[start:, None], order[start : start + width]].double()
        panel.diagonal().add_(extra)
        for before in panels:
            left = before[start - len(order) :]
            panel.addmm_(left, left[:width].T, alpha=-1)
        top, failed = torch.linalg.cholesky_ex(panel[:width])
        if bool(failed):
            return None
        panel[:width] = top
        if len(panel) > width:
            panel[width:] = torch.linalg.solve_triangular(top.T, panel[width:], upper=True, left=False)
        panels.append(panel)
        start += width
    return panels
