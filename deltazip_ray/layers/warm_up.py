"""Kernels of deltas, compiled before a step needs them. Runs beside the steps, on tensors of its own."""

import torch
import triton

from deltazip_kernels import CODECS, PackedDelta, Segments, packed_layout
from deltazip_kernels.merged import merge_weight
from deltazip_kernels.plan import MORE, SOME, plan
from deltazip_ray.layers.activations import Activations
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.triton_ops import TritonStack

_BATCHES = (
    (SOME, 1, SOME),
    (32, 32, MORE),
    (8 * SOME, SOME, SOME),
    (MORE, 1, MORE),
    (2 * MORE, 2, MORE),
    (SOME * MORE, SOME, MORE),
    (40, 1, 40),
    (64, 1, 64),
)
"""Rows, segments and rows of the longest of steps that together need every launch there is: items of some rows, of more
and of many, each by few programs that share K, by few, and by plenty; single rows of many versions."""
_ROWS = 64


def warm_stack(stack: TritonStack, codecs: tuple[str, ...], rank: int, *, looked_up: bool) -> None:
    """Compile what steps launch for deltas of ``codecs`` in a stack like this one, low-rank ones up to ``rank``.

    ``looked_up``: also what an embedding does.
    """
    if not triton.knobs.runtime.interpret:
        launch_all(stack, codecs, rank, looked_up=looked_up)


def launch_all(stack: TritonStack, codecs: tuple[str, ...], rank: int, *, looked_up: bool) -> None:
    """Launch every kernel once that :func:`warm_stack` is to compile."""
    twin = TritonStack(stack.shapes, 1, stack.ops)  # its only slot is empty: kernels find nothing to do
    twin.codecs, twin.rank = codecs, rank
    device, dtype, columns = stack.ops.device, stack.ops.dtype, stack.shapes[0][1]
    for rows, segments, longest in _BATCHES:
        starts = torch.linspace(0, rows, segments + 1, device=device).int()
        index = torch.ones(rows, dtype=torch.int32, device=device)
        batch = Rows(index, work=plan(Segments(starts, torch.zeros_like(starts[1:])), rows, longest))
        x = torch.zeros(rows, columns, dtype=dtype, device=device)
        twin.add_product(torch.empty(rows, twin.starts[-1], dtype=dtype, device=device), Activations(x), batch)
        if looked_up:
            twin.add_weights(x, torch.zeros(rows, dtype=torch.int64, device=device), batch)
    for codec in codecs:
        if codec in CODECS:
            _warm_merge(codec, columns, device, dtype)


def _warm_merge(codec: str, columns: int, device: torch.device, dtype: torch.dtype) -> None:
    shape = (_ROWS, columns)
    parts = {
        name: torch.zeros(size, dtype=kind, device=device) for name, (size, kind) in packed_layout(codec, shape).items()
    }
    weight = torch.zeros(shape, dtype=dtype, device=device)
    merge_weight(weight, PackedDelta(codec, shape, parts), torch.empty_like(weight))
