"""How far a reconstruction is from its fine-tune."""

from torch import Tensor


def relative(squared_error: Tensor | float, squared_norm: Tensor | float) -> float:
    """Root of a ratio of squared norms; 0 when there is nothing to be relative to."""
    norm = float(squared_norm)
    # max keeps a first argument that is NaN, so that an overflow is seen.
    return max(float(squared_error) / norm, 0.0) ** 0.5 if norm != 0 else 0.0
