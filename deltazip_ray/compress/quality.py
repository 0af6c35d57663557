"""How far a reconstruction is from its fine-tune."""

from math import isfinite

from torch import Tensor

from deltazip_ray.errors import CompressionError


def relative(squared_error: Tensor | float, squared_norm: Tensor | float) -> float:
    """Root of a ratio of squared norms; 0 when there is nothing to be relative to."""
    norm = float(squared_norm)
    # max keeps a first argument that is NaN, so that an overflow is seen.
    return max(float(squared_error) / norm, 0.0) ** 0.5 if norm != 0 else 0.0


def finite(measured: float, where: str) -> float:
    """Return what was measured. Raises CompressionError when it is not a number."""
    if not isfinite(measured):
        raise CompressionError(
            f"the outputs of {where} overflow on the calibration data: compress with dtype float32 or bfloat16, "
            "and check that base and fine-tune themselves give finite outputs"
        )
    return measured
