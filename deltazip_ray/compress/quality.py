"""Measures the distance between a reconstruction and its fine-tune."""

from math import isfinite

from torch import Tensor

from deltazip_ray.errors import CompressionError


def relative(squared_error: Tensor | float, squared_norm: Tensor | float) -> float:
    """Square root of a ratio of squared norms; 0 when the norm is 0."""
    norm = float(squared_norm)
    # max returns its first argument if that is NaN, so that an overflow is not hidden.
    return max(float(squared_error) / norm, 0.0) ** 0.5 if norm != 0 else 0.0


def finite(measured: float, where: str) -> float:
    """Return ``measured``. Raises CompressionError when it is not finite."""
    if not isfinite(measured):
        raise CompressionError(
            f"the outputs of {where} overflow on the calibration data: compress with dtype float32 or bfloat16, "
            "and check that base and fine-tune themselves give finite outputs"
        )
    return measured
