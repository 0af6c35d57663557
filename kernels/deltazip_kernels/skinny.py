"""The base's products: for few rows a GEMM of our own where it is faster than the library's, in bf16 and in fp8."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from deltazip_kernels.device.skinny import skinny
from deltazip_kernels.fp8 import Fp8Matrix, fp8_matmul_torch
from deltazip_kernels.launch import launch, overlap

MOST_ROWS = 64
"""Rows up to which reading the weight takes longer than multiplying it."""
FASTER = {(6144, 4096): 32, (4096, 4096): 32, (28672, 4096): 64, (4096, 14336): 64, (128256, 4096): 64}
"""Shapes ``[N, K]`` of 16-bit weights for which cuBLAS is slower, up to so many rows: the linears of an 8B model on an
H200 (``docs/engine.md``). In fp8 the library is slower for all."""
_PART_COUNTS = (1, 2, 4, 8)
_TILE_ROWS = 64
_MAX_TILES = 4096
_PARTIALS = 1 << 20
"""Floats that programs which share K leave: fewer than 256 of them, each for up to 64 rows of 64 outputs."""
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
        # Not of torch's pool: that may give memory which the product with deltas ahead still reads.
        self._partials = torch.empty(_PARTIALS, dtype=torch.float32, device=device)
        self._hopper = triton.knobs.runtime.interpret or torch.cuda.get_device_capability(device)[0] == 9

    def cut(self, x: Tensor | Fp8Matrix, weight: Tensor | Fp8Matrix) -> Cut | None:
        """How the kernel takes ``x`` ``[T, K]`` times ``weight`` ``[N, K]``; None: that is left to the library."""
        shape = (weight.shape[0], weight.shape[1])
        if not self._hopper:
            return None
        if isinstance(x, Fp8Matrix):
            return cut(len(x), shape, 1)
        fits = x.dtype.itemsize == 2 and x.stride(1) == 1 and x.shape[0] <= FASTER.get(shape, 0)
        return cut(x.shape[0], shape, 2) if fits else None

    def __call__(
        self, y: Tensor, x: Tensor | Fp8Matrix, weight: Tensor | Fp8Matrix, deltas: Tensor | None = None
    ) -> None:
        """Write ``y`` ``[T, N]`` for ``x`` ``[T, K]`` and ``weight`` ``[N, K]``, all of one type or both in fp8.

        Products in fp8 are added up in float32; on a GPU ``y`` must be bfloat16 then. Where :meth:`cut` is not None,
        ``deltas`` ``[T, N]`` of the type of ``y`` may be what the launches just ahead have added to zeros: it is added
        before ``y`` is rounded, and is zero again.
        """
        chosen = self.cut(x, weight)
        if chosen is not None:
            self._launch(y, x, weight, chosen, deltas)
        elif isinstance(x, Tensor) and isinstance(weight, Tensor):
            torch.mm(x, weight.T, out=y)
        elif isinstance(x, Fp8Matrix) and isinstance(weight, Fp8Matrix):
            _multiply_fp8(y, x, weight)
        else:
            raise TypeError("activations and weight must both be in fp8, or neither")

    def _launch(
        self, y: Tensor, x: Tensor | Fp8Matrix, weight: Tensor | Fp8Matrix, chosen: Cut, deltas: Tensor | None
    ) -> None:
        (rows, columns), outputs = x.shape, weight.shape[0]
        (x, x_scales), (weight, w_scales) = _parts(x), _parts(weight)
        launch(
            skinny,
            (outputs // _TILE_ROWS, chosen.parts),
            y,
            y.stride(0),
            x,
            x.stride(0),
            x_scales,
            weight,
            w_scales,
            self._partials,
            self._arrived,
            y if deltas is None else deltas,
            rows,
            columns,
            columns // (chosen.parts * chosen.columns),
            SPLIT=chosen.parts,
            BM=padded(rows),
            BN=_TILE_ROWS,
            BK=chosen.columns,
            STAGES=chosen.stages,
            SCALED=x_scales is not x,
            ADD=deltas is not None,
            num_warps=4,
            **overlap(x.device),
        )


def _parts(matrix: Tensor | Fp8Matrix) -> tuple[Tensor, Tensor]:
    """Values, and their scales where they have any."""
    return (matrix.values, matrix.scales) if isinstance(matrix, Fp8Matrix) else (matrix, matrix)


def _multiply_fp8(y: Tensor, x: Fp8Matrix, weight: Fp8Matrix) -> None:
    if y.device.type != "cuda":
        y.copy_(fp8_matmul_torch(x, weight, y.dtype))
        return
    # cuBLAS wants scales that start at a multiple of 16 bytes, which those of some rows of a batch do not.
    scales = x.scales if x.scales.data_ptr() % 16 == 0 else x.scales.clone()
    torch._scaled_mm(x.values, weight.values.T, scales[:, None], weight.scales[None], out_dtype=y.dtype, out=y)
