"""The base's product for few rows, and for fp8: a GEMM of our own where it is faster than the library's."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deltazip_kernels.device.skinny import skinny
from deltazip_kernels.fp8 import Fp8Matrix, fp8_matmul_torch
from deltazip_kernels.launch import overlap

MOST_ROWS = 64
"""Rows up to which reading the weight takes longer than multiplying it."""
_ROWS = 64
"""Of the weight in one program."""
_COLUMNS = 128
_TILES = 4096
_PROGRAMS = 264
_PARTS = (1, 2, 4, 7, 8)


@dataclass(frozen=True)
class Cut:
    """How a launch is cut: parts of K, columns and depth of the pipeline along K, bytes of each row to fetch ahead."""

    parts: int
    columns: int
    stages: int
    ahead: int


class BaseProduct:
    """``x W^T`` for the weights of one base. Launches of one object must not overlap: one stream at a time."""

    def __init__(self, device: torch.device) -> None:
        self._arrived = torch.zeros(_TILES, dtype=torch.int32, device=device)
        """Programs of a tile that have arrived; zero between launches."""

    def __call__(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """Write ``y`` ``[T, N]`` for ``x`` ``[T, K]`` and ``weight`` ``[N, K]``, all of one type."""
        torch.mm(x, weight.T, out=y)

    def fp8(self, y: Tensor, x: Fp8Matrix, weight: Fp8Matrix) -> None:
        """The same in fp8, added up in float32; on a GPU ``y`` must be bfloat16."""
        cut = fp8_cut(len(x), weight.shape)
        if cut is not None:
            self._launch(y, x.values, weight.values, cut, (x.scales, weight.scales))
        elif y.device.type == "cuda":
            scales = x.scales[:, None], weight.scales[None]
            torch._scaled_mm(x.values, weight.values.T, *scales, out_dtype=y.dtype, out=y)
        else:
            y.copy_(fp8_matmul_torch(x, weight, y.dtype))

    def _launch(self, y: Tensor, x: Tensor, weight: Tensor, cut: Cut, scales: tuple[Tensor, Tensor] | None) -> None:
        (rows, columns), outputs = x.shape, len(weight)
        width = max(16, triton.next_power_of_2(rows))
        partials = y
        if cut.parts > 1:
            partials = torch.empty(cut.parts * width * outputs, dtype=torch.float32, device=x.device)
        x_scales, w_scales = scales or (x, weight)
        skinny[(outputs // _ROWS, cut.parts)](
            y,
            y.stride(0),
            x,
            x.stride(0),
            x_scales,
            weight,
            w_scales,
            partials,
            self._arrived,
            rows,
            columns,
            columns // (cut.parts * cut.columns),
            cut.ahead,
            SPLIT=cut.parts,
            BM=width,
            BN=_ROWS,
            BK=cut.columns,
            STAGES=cut.stages,
            SCALED=scales is not None,
            num_warps=4,
            **overlap(x.device),
        )


def fp8_cut(rows: int, shape: tuple[int, int]) -> Cut | None:
    """The cut of a product with an fp8 weight ``shape`` ``[N, K]``; None: the library's is the better one."""
    outputs, columns = shape
    tiles = outputs // _ROWS
    if rows > MOST_ROWS or not rows or outputs % _ROWS or tiles > _TILES:
        return None
    fitting = [parts for parts in _PARTS if columns % (parts * _COLUMNS) == 0]
    if not fitting:
        return None
    enough = (parts for parts in fitting if parts * tiles >= _PROGRAMS)
    return Cut(next(enough, fitting[-1]), _COLUMNS, 4, 512)
