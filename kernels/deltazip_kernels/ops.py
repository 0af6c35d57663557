"""The grouped delta product, one operator over several backends."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from deltazip_kernels.delta import LOW_RANK, RAW, PackedDelta, Segments
from deltazip_kernels.reference import delta_matmul_torch

__all__ = ["BACKENDS", "LOW_RANK", "RAW", "PackedDelta", "Segments", "delta_matmul"]

Backend = Callable[[Tensor, Tensor, Sequence[PackedDelta | None], Segments], None]


def _triton(y: Tensor, x: Tensor, deltas: Sequence[PackedDelta | None], segments: Segments) -> None:
    from deltazip_kernels.triton_backend import delta_matmul_triton  # compiles for a GPU, which a CPU host has not

    delta_matmul_triton(y, x, deltas, segments)


BACKENDS: Mapping[str, Backend] = {"torch": delta_matmul_torch, "triton": _triton}


def delta_matmul(
    y: Tensor, x: Tensor, deltas: Sequence[PackedDelta | None], segments: Segments, *, backend: str = "torch"
) -> None:
    """``y[rows of s] += x[rows of s] @ dequant(deltas[slot of s]).T`` for every segment ``s``, in place.

    ``y`` ``[T, N]`` may be a column slice of a wider tensor, ``x`` is ``[T, K]``, ``deltas`` has one matrix ``[N, K]``
    a slot. Rows of slot -1, of a slot that holds None, and of no segment keep their bits.
    ``torch`` computes in float32; ``triton`` needs a GPU and rounds activations to int8 for packed codecs.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    run = BACKENDS.get(backend)
    if run is None:
        raise ValueError(f"unknown backend {backend!r}: use one of {', '.join(BACKENDS)}")
    if y.dim() != 2 or x.dim() != 2 or y.shape[0] != x.shape[0]:
        raise ValueError(f"y and x must be [T, N] and [T, K], not {list(y.shape)} and {list(x.shape)}")
    shape = (y.shape[1], x.shape[1])
    for delta in deltas:
        if delta is not None and delta.shape != shape:
            raise ValueError(f"a delta of shape {delta.shape} does not fit a product of shape {shape}")
    run(y, x, deltas, segments)
