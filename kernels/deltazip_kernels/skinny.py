"""The base's products: for few rows a GEMM of our own where it is faster than the library's, in bf16 and in fp8."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from deltazip_kernels.device.skinny import skinny
from deltazip_kernels.fp8 import Fp8Matrix, fp8_matmul_torch
from deltazip_kernels.launch import overlap

MOST_ROWS = 64
"""Rows up to which reading the weight takes longer than multiplying it."""
FASTER = {(6144, 4096): 32, (4096, 4096): 32, (28672, 4096): 64, (4096, 14336): 64, (128256, 4096): 64}
"""Shapes ``[N, K]`` of 16-bit weights for which cuBLAS is slower, up to so many rows: the linears of an 8B model on an
H200 (``docs/engine.md``). In fp8 the library is slower for all."""
_PART_COUNTS = (1, 2, 4, 8)
_TILE_ROWS = 64
_MAX_TILES = 4096
_SMS = 132
_SHARED_BYTES = 216 << 10
"""Of one multiprocessor."""


@dataclass(frozen=True)
class Cut:
    """How a launch is cut: parts of K, columns of one step along it, and steps that are under way at once."""

    parts: int
    columns: int
    stages: int


@cache
def cut(rows: int, shape: tuple[int, int], itemsize: int) -> Cut | None:
    """The cut for ``rows`` activations and a weight ``shape`` ``[N, K]``; None where the kernel does not take them.

    Enough programs for all multiprocessors, and no more parts than that takes; their steps fill the shared memory.
    """
    outputs, columns = shape
    tiles = outputs // _TILE_ROWS
    if not 0 < rows <= MOST_ROWS or outputs % _TILE_ROWS or tiles > _MAX_TILES:
        return None
    parts = next((count for count in _PART_COUNTS if count * tiles >= _SMS - 4), _PART_COUNTS[-1])
    while parts > 1 and columns % (parts * 256 // itemsize):
        parts //= 2
    width = padded(rows)
    if parts == 1:
        return None if columns % 128 else Cut(1, 128, 3 if width == MOST_ROWS else 4)
    resident = -(-parts * tiles // _SMS)
    stages = _SHARED_BYTES // resident // (256 * (_TILE_ROWS + width))
    return Cut(parts, 256 // itemsize, max(2, min(6, stages)))


def padded(rows: int) -> int:
    """Rows that a program computes: what the tensor cores take."""
    return max(16, 1 << (rows - 1).bit_length())


class BaseProduct:
    """``x W^T`` for the weights of one base. Launches of one object must not overlap: one stream at a time."""

    def __init__(self, device: torch.device) -> None:
        self._arrived = torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)
        """Programs of a tile that have arrived; zero between launches."""
        self._hopper = triton.knobs.runtime.interpret or torch.cuda.get_device_capability(device)[0] == 9

    def __call__(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """Write ``y`` ``[T, N]`` for ``x`` ``[T, K]`` and ``weight`` ``[N, K]``, all of one type."""
        outputs, columns = weight.shape
        chosen = None
        fits = x.dtype.itemsize == 2 and x.stride(1) == 1 and x.shape[0] <= FASTER.get((outputs, columns), 0)
        if fits and self._hopper:
            chosen = cut(x.shape[0], (outputs, columns), 2)
        if chosen is None:
            torch.mm(x, weight.T, out=y)
        else:
            self._launch(y, x, weight, chosen)

    def fp8(self, y: Tensor, x: Fp8Matrix, weight: Fp8Matrix) -> None:
        """The same in fp8, added up in float32; on a GPU ``y`` must be bfloat16."""
        chosen = cut(len(x), weight.shape, 1) if self._hopper else None
        if chosen is not None:
            self._launch(y, x.values, weight.values, chosen, (x.scales, weight.scales))
        elif y.device.type == "cuda":
            # cuBLAS wants scales that start at a multiple of 16 bytes, which those of some rows of a batch do not.
            scales = x.scales if x.scales.data_ptr() % 16 == 0 else x.scales.clone()
            torch._scaled_mm(x.values, weight.values.T, scales[:, None], weight.scales[None], out_dtype=y.dtype, out=y)
        else:
            y.copy_(fp8_matmul_torch(x, weight, y.dtype))

    def _launch(
        self, y: Tensor, x: Tensor, weight: Tensor, chosen: Cut, scales: tuple[Tensor, Tensor] | None = None
    ) -> None:
        (rows, columns), outputs = x.shape, weight.shape[0]
        width = padded(rows)
        partials = y
        if chosen.parts > 1:
            partials = torch.empty(chosen.parts * width * outputs, dtype=torch.float32, device=x.device)
        x_scales, w_scales = scales or (x, weight)
        skinny[(outputs // _TILE_ROWS, chosen.parts)](
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
            columns // (chosen.parts * chosen.columns),
            SPLIT=chosen.parts,
            BM=width,
            BN=_TILE_ROWS,
            BK=chosen.columns,
            STAGES=chosen.stages,
            SCALED=scales is not None,
            num_warps=4,
            **overlap(x.device),
        )
