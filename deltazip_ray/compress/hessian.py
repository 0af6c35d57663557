"""The second-order statistics of a linear's inputs."""

import torch
from torch import Tensor

from deltazip_ray.compress.precision import float32_products
from deltazip_ray.errors import CompressionError

COLUMNS = 2048
"""Columns of an inverse that are held in float64 at a time."""

PIECE = 16384
"""Rows whose products are held at a time."""
JITTER = 1e-6
"""First addition to the diagonal of an indefinite matrix, above the rounding of float32 sums of squares."""


class Hessian:
    """Sum of ``xᵀ x`` over the inputs ``x`` of one linear; half the Hessian of its squared output error."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.matrix = torch.zeros(columns, columns, device=device)

    @float32_products("highest")
    def add(self, inputs: Tensor) -> None:
        """Take in ``inputs`` ``[tokens, columns]``. Raises CompressionError when they are not finite."""
        inputs = inputs.float()
        self.matrix.addmm_(inputs.T, inputs)

    def check(self, where: str) -> None:
        """Raise CompressionError when some input was not finite, or too large to be squared."""
        if not self.matrix.isfinite().all():
            raise CompressionError(
                f"the inputs of {where} overflow on the calibration data: compress with dtype float32 or bfloat16, "
                "and check that the fine-tune itself gives finite outputs"
            )

    def damped(self, damping: float) -> Tensor:
        """The matrix scaled to mean diagonal 1, plus ``damping`` on the diagonal: positive definite, float64.

        The damping bounds what compensation may put on directions that few calibration tokens span, and makes a
        column that was never active (a zero row and column) an independent one, so that it is rounded to nearest.
        """
        matrix = self.matrix.double()
        mean = matrix.diagonal().mean()
        if mean > 0:
            matrix /= mean
        matrix.diagonal().add_(damping)
        return matrix

    @float32_products("highest")
    def squared_norm(self, rows: Tensor) -> Tensor:
        """``‖x rowᵀ‖²`` summed over the inputs and all ``rows`` ``[N, columns]``: a scalar."""
        # In pieces: a head has many rows.
        return torch.stack([((part @ self.matrix) * part).sum() for part in torch.split(rows, PIECE)]).sum()


def inverse_factor(damped: Tensor, order: Tensor) -> Tensor:
    """Upper triangular ``U`` with ``Uᵀ U = H⁻¹``, float32, where H is ``damped`` with rows and columns in ``order``.

    Its row ``i`` is that of the inverse Hessian of the columns from ``i`` on, divided by the root of its first
    element: all that the elimination of the columns in order needs (GPTQ, arXiv 2210.17323, step 3).
    A matrix that rounding has left indefinite gets more on its diagonal until it is not.
    """
    # With M Mᵀ = H for an upper triangular M (the Cholesky factor of H in reverse order), U = M⁻¹.
    reverse = order.flip(0)
    lower = _cholesky(damped[reverse[:, None], reverse])
    inverse = torch.empty(lower.shape, device=lower.device)
    for columns in torch.split(torch.arange(len(lower), device=lower.device), COLUMNS):
        unit = lower.new_zeros(len(lower), len(columns))
        unit[columns, torch.arange(len(columns), device=lower.device)] = 1
        inverse[:, columns] = torch.linalg.solve_triangular(lower, unit, upper=False).float()
    return inverse.flip(0, 1)


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of ``matrix``, or of it plus as little on the diagonal as makes it positive definite."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    extra = JITTER
    while bool(failed):
        raised = matrix.clone()
        raised.diagonal().add_(extra)
        lower, failed = torch.linalg.cholesky_ex(raised)
        extra *= 10
    return lower
