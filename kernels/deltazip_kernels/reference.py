"""The torch backend: the meaning of the grouped delta product, for CPUs and for tests."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltazip_kernels.delta import LOW_RANK, RAW, PackedDelta, Segments
from deltazip_kernels.layout import GROUP, dequantize, to_positions


def delta_matmul_torch(y: Tensor, x: Tensor, deltas: Sequence[PackedDelta | None], segments: Segments) -> None:
    """:func:`deltazip_kernels.ops.delta_matmul` in float32 (float64 for float64 activations).

    Reads the segment table on the host, so on a GPU it waits for the stream.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    starts, slots = segments.starts.tolist(), segments.slots.tolist()
    for slot, first, last in zip(slots, starts, starts[1:], strict=False):
        delta = None if slot < 0 else deltas[slot]
        if delta is None or first == last:
            continue
        y[first:last] += _product(x[first:last].to(dtype), delta).to(y.dtype)


def _product(x: Tensor, delta: PackedDelta) -> Tensor:
    """``x [T, K] @ dequant(delta).T``, in the dtype of ``x``."""
    rows, columns = delta.shape
    if delta.codec == RAW:
        return x @ delta.tensors["values"].to(x.dtype).T
    if delta.codec == LOW_RANK:
        return x @ delta.tensors["down"].to(x.dtype).T @ delta.tensors["up"].to(x.dtype).T
    # Reordering x costs T x K; reordering the weight would cost N x K.
    weight = dequantize(delta.codec, delta.tensors, delta.shape).to(x.dtype)
    return to_positions(pad(x, (0, -columns % GROUP))) @ weight[:rows].T
