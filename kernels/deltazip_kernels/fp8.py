"""Matrices in fp8 (e4m3), one scale a row: a base's weights by output channel, and activations by token."""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_MAX = torch.finfo(FP8).max
_SMALLEST = 1e-30
FP8_MULTIPLE = 16
"""What rows and columns of a weight come in multiples of: the tensor cores read 16 bytes at a time."""
_CHUNK = 1 << 24
"""Elements that are in float32 at once while a matrix is converted."""


@dataclass(frozen=True)
class Fp8Matrix:
    """``values`` [R, K] e4m3 times ``scales`` [R] float32.

    A value has 4 significant bits and is at most 448 before scaling: rounding moves it by at most 1/16 of itself, or by
    2**-10 / 448 of the largest magnitude of its row where that is more.
    """

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``[R, K]``."""
        return self.values.shape[0], self.values.shape[1]

    def __len__(self) -> int:
        return self.values.shape[0]

    def rows(self, start: int, stop: int) -> "Fp8Matrix":
        """A view of some rows."""
        return Fp8Matrix(self.values[start:stop], self.scales[start:stop])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``[R, K]`` in ``dtype``, rounded once."""
        out = torch.empty(self.shape, dtype=dtype, device=self.values.device)
        step = max(1, _CHUNK // self.shape[1])
        for start in range(0, len(self), step):
            here = slice(start, start + step)
            out[here] = self.values[here].float() * self.scales[here, None]
        return out

    def fill(self, x: Tensor) -> None:
        """Become ``x`` ``[R, K]``, rounded to nearest with the largest magnitude of each row at 448."""
        step = max(1, _CHUNK // self.shape[1])
        for start in range(0, len(self), step):
            here = slice(start, start + step)
            part = x[here].to(self.values.device).float()
            top = part.abs().amax(1)
            live = top > _SMALLEST
            self.scales[here] = (top / _MAX).where(live, 0.0)
            inverse = (_MAX / top.where(live, 1.0)).where(live, 0.0)
            self.values[here] = (part * inverse[:, None]).clamp(-_MAX, _MAX).to(FP8)


def empty_fp8(rows: int, columns: int, device: torch.device) -> Fp8Matrix:
    """Room for a matrix."""
    values = torch.empty((rows, columns), dtype=FP8, device=device)
    return Fp8Matrix(values, torch.empty(rows, dtype=torch.float32, device=device))


def round_to_fp8(x: Tensor) -> Fp8Matrix:
    """``x`` ``[R, K]`` in fp8."""
    matrix = empty_fp8(x.shape[0], x.shape[1], x.device)
    matrix.fill(x)
    return matrix


def fp8_matmul_torch(x: Fp8Matrix, weight: Fp8Matrix, dtype: torch.dtype) -> Tensor:
    """``x W^T`` ``[T, N]``, added up in float32 and rounded once to ``dtype``: the meaning of the kernels' product."""
    return (x.dequantize(torch.float32) @ weight.dequantize(torch.float32).T).to(dtype)
