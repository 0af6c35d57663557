"""The base's products, in bf16 and fp8: for few rows a GEMM of our own where it is faster than cuBLAS, else cuBLAS."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from deltazip_kernels.device.skinny import skinny
from deltazip_kernels.fp8 import Fp8Matrix, fp8_matmul_torch
from deltazip_kernels.launch import launch, overlap

MOST_ROWS = 64
"""Up to this many rows, reading the weight takes longer than multiplying it."""
FASTER = {(6144, 4096): 32, (4096, 4096): 32, (28672, 4096): 64, (4096, 14336): 64, (128256, 4096): 64}
"""Shapes ``[N, K]`` of 16-bit weights, and the rows up to which our GEMM beats cuBLAS there: the linears of an 8B model
on an H200 (``docs/engine.md``). In fp8 it is faster for all shapes."""
_PART_COUNTS = (1, 2, 4, 8)
_TILE_ROWS = 64
_MAX_TILES = 4096
_PARTIALS = 1 << 20
"""Floats of partial sums. Fewer than 256 programs share K, and each has up to 64 rows of 64 outputs."""
_SMS = 132
_SHARED_BYTES = 216 << 10
"""Shared memory of a multiprocessor that steps may fill."""


@dataclass(frozen=True)
class Cut:
    """How a launch is cut: programs that share K, columns of one step along K, and steps in flight."""

    parts: int
    columns: int
    stages: int


@cache
def cut(rows: int, shape: tuple[int, int], itemsize: int) -> Cut | None:
    """The cut for ``rows`` activations and a weight ``shape`` ``[N, K]``; None if the kernel does not support them.

    K is split into as few parts as give every multiprocessor a program; steps in flight fill its shared memory.
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
    """``rows`` padded to what the tensor cores take."""
    return max(16, 1 << (rows - 1).bit_length())


class BaseProduct:
    """``x W^T`` for the weights of one base. Launches share buffers, so one object belongs to one stream."""

    def __init__(self, device: torch.device) -> None:
        self._arrived = torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)
        """Counts the programs of a tile that are done; zero between launches."""
        # Not from torch's pool, which may hand out memory that the deltas' product, still running, reads.
        self._partials = torch.empty(_PARTIALS, dtype=torch.float32, device=device)
        self._hopper = triton.knobs.runtime.interpret or torch.cuda.get_device_capability(device)[0] == 9

    def cut(self, x: Tensor | Fp8Matrix, weight: Tensor | Fp8Matrix) -> Cut | None:
        """The cut for ``x`` ``[T, K]`` times ``weight`` ``[N, K]``; None if cuBLAS does it."""
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
        """Write ``y`` ``[T, N]`` for ``x`` ``[T, K]`` and ``weight`` ``[N, K]``, all of one type, or both in fp8.

        Products in fp8 are summed in float32, and ``y`` must then be bfloat16 on a GPU. ``deltas`` ``[T, N]``, of the
        type of ``y``, is added before ``y`` is rounded, and is set to zero; only if :meth:`cut` is not None.
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
    """Values and scales; for a matrix without scales itself twice, as kernels take no None."""
    return (matrix.values, matrix.scales) if isinstance(matrix, Fp8Matrix) else (matrix, matrix)


def _multiply_fp8(y: Tensor, x: Fp8Matrix, weight: Fp8Matrix) -> None:
    if y.device.type != "cuda":
        y.copy_(fp8_matmul_torch(x, weight, y.dtype))
        return
    # cuBLAS wants scales that start at a multiple of 16 bytes; a slice of a batch's scales may not.
    scales = x.scales if x.scales.data_ptr() % 16 == 0 else x.scales.clone()
    torch._scaled_mm(x.values, weight.values.T, scales[:, None], weight.scales[None], out_dtype=y.dtype, out=y)
