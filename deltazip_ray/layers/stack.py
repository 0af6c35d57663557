"""The deltas of one linear, or of several linears that share their input."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F

from deltazip_kernels import LOW_RANK, RAW, PackedDelta, delta_matmul, unpack_rows
from deltazip_ray.layers.activations import Activations
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.writes import Writes


class DeltaStack:
    """A delta, or None, for each slot and each of ``shapes``: linears ``[N_i, K]`` whose outputs lie side by side."""

    def __init__(self, shapes: Sequence[tuple[int, int]], slots: int) -> None:
        self.shapes = tuple(shapes)
        self.starts = (0, *accumulate(rows for rows, _ in shapes))
        self.deltas: list[list[PackedDelta | None]] = [[None] * slots for _ in shapes]

    def put(self, slot: int, part: int, delta: PackedDelta | None, writes: Writes) -> None:
        """Use ``delta`` for part ``part`` of the rows of ``slot`` once ``writes`` are sent; None: the base alone."""
        self.deltas[part][slot] = delta

    def add_product(self, y: torch.Tensor, x: Activations, rows: Rows) -> None:
        """Add to each row of ``y`` ``[rows, sum N_i]`` the product of ``x`` with the deltas of the row's slot."""
        if rows.segments is None or not rows.spans:
            return
        for deltas, start, stop in zip(self.deltas, self.starts, self.starts[1:], strict=False):
            delta_matmul(y[:, start:stop], x.values, deltas, rows.segments)

    def add_weights(self, hidden: torch.Tensor, chosen: torch.Tensor, rows: Rows) -> None:
        """Add to each ``hidden[t]`` ``[K]`` row ``chosen[t]`` of the delta of its slot: an embedding's deltas.

        For stacks of one part. ``chosen`` ``[rows]`` int64; nothing is added for rows that the matrix does not have.
        """
        (deltas,) = self.deltas
        for span in rows.spans:
            delta = deltas[span.slot]
            if delta is not None:
                here = slice(span.start, span.stop)
                inside = chosen[here] < delta.shape[0]
                weights = _weights(delta, chosen[here] * inside) * inside[:, None]
                hidden[here] += weights.to(hidden.dtype)


def _weights(delta: PackedDelta, chosen: torch.Tensor) -> torch.Tensor:
    """Rows ``chosen`` of a delta, ``[chosen, K]``."""
    if delta.codec == RAW:
        return F.embedding(chosen, delta.tensors["values"])
    if delta.codec == LOW_RANK:
        return F.embedding(chosen, delta.tensors["up"]) @ delta.tensors["down"]
    return unpack_rows(delta.codec, delta.tensors, delta.shape, chosen)
