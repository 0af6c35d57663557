"""Launches everything that steps may launch for a codec, so that its kernels can be compiled beforehand.

``test_no_step_launches_what_was_not_compiled`` compares this with real steps.
"""

from collections.abc import Iterator, Sequence

import torch

from deltazip_kernels import CODECS, PackedDelta, Segments, packed_layout
from deltazip_kernels.fp8 import Fp8Matrix
from deltazip_kernels.fused import FUSED_CODECS, RowTiles
from deltazip_kernels.merged import merge_weight
from deltazip_kernels.plan import MORE, SOME, plan
from deltazip_kernels.skinny import MOST_ROWS
from deltazip_kernels.table import table_of
from deltazip_ray.layers.activations import Activations, BaseWeight, weight_rows
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.triton_ops import FIRST_ROWS, TritonOps, TritonStack

_BATCHES = (
    (SOME, 1, SOME),
    (8, 8, 1),
    (256, 64, MORE),
    (64, 8, SOME),
    (MORE, 1, MORE),
    (2 * MORE, 2, MORE),
    (64, 8, MORE),
    (40, 1, 40),
    (64, 1, 64),
    (64, 8, 64),
    (32, 32, 1),
    (1024, 64, SOME),
    (2048, 64, MORE),
)
"""Example steps as (rows, segments, rows of the longest segment). Together they need every kernel of a grouped launch:
work items of ``SOME``, ``MORE`` and ``MANY`` rows, each for few programs, which share K, for some, and for many; and
single rows of many versions."""
_FIRST_BATCHES = ((SOME, 1, SOME), (8, 8, 1), (MORE, MORE, 1), (MORE, 4, SOME), (MORE, 1, MORE), (MORE, 4, MORE))
"""Likewise, for steps that multiply deltas before the base."""
_FEW_ROWS = (SOME, MORE, MOST_ROWS)
"""Numbers of rows that together need every kernel of the base's own small product."""
_OUTPUTS = 128
"""Outputs of the matrix that stands for a long segment's: kernels do not depend on them."""


def launch_all(stack: TritonStack, codecs: tuple[str, ...], rank: int, base: BaseWeight, *, looked_up: bool) -> None:
    """Launch what steps launch for deltas of ``codecs``, low-rank ones up to ``rank``, in a stack of the same shapes.

    Only inside :func:`deltazip_kernels.launch.compiling`, where nothing runs. ``base`` ``[out, in]`` is the stack's
    weight, or a part of it. ``looked_up``: the matrix is also used as an embedding.
    """
    twin = TritonStack(stack.shapes, 1, stack.ops)
    twin.groups, twin.rank = (codecs,) if codecs else (), rank
    device, dtype, columns = stack.ops.device, stack.ops.dtype, stack.shapes[0][1]
    x = torch.empty(1, columns, dtype=dtype, device=device)
    y = torch.empty(1, twin.starts[-1], dtype=dtype, device=device)
    for batch in _rows(_BATCHES, device):
        twin.add_product(y, Activations(x), batch)
        if looked_up:
            twin.add_weights(x, torch.empty(1, dtype=torch.int64, device=device), batch)
    if _multiply_few(stack.ops, base, twin.starts[-1]):
        for batch in _rows(_FIRST_BATCHES, device):
            twin.add_product(y, Activations(x), batch, first=True)
    for codec in codecs:
        if codec in CODECS:
            _multiply_long(stack.ops, weight_rows(base, 0, _OUTPUTS), codec)


def _rows(batches: Sequence[tuple[int, int, int]], device: torch.device) -> Iterator[Rows]:
    for rows, segments, longest in batches:
        starts = torch.empty(segments + 1, dtype=torch.int32, device=device)
        yield Rows(starts, work=plan(Segments(starts, starts[1:]), rows, longest), rounded=1)


def _multiply_few(ops: TritonOps, base: BaseWeight, outputs: int) -> bool:
    """Launch the base's own small product for a weight like ``base`` with ``outputs`` rows, also adding deltas to it.

    Returns False if no kernel of ours takes that weight.
    """
    weight = _repeated(base, outputs)
    inputs = [x for x in (_repeated(base, rows) for rows in _FEW_ROWS) if ops.product.cut(x, weight) is not None]
    for x in inputs:
        y = torch.empty((len(x), outputs), dtype=ops.dtype, device=ops.device)
        ops.product(y, x, weight)
        if len(x) <= FIRST_ROWS:
            ops.product(y, x, weight, y)
    return bool(inputs)


def _repeated(matrix: BaseWeight, rows: int) -> BaseWeight:
    """A view of ``rows`` rows, all of which are the first one of ``matrix``."""
    if isinstance(matrix, Fp8Matrix):
        return Fp8Matrix(matrix.values[:1].expand(rows, -1), matrix.scales[:1].expand(rows))
    return matrix[:1].expand(rows, -1)


def _multiply_long(ops: TritonOps, weight: BaseWeight, codec: str) -> None:
    """Launch what a long segment needs: merging a weight, and the fused product."""
    shape = (weight.shape[0], weight.shape[1])
    layout = packed_layout(codec, shape)
    parts = {name: torch.empty(size, dtype=kind, device=ops.device) for name, (size, kind) in layout.items()}
    delta = PackedDelta(codec, shape, parts)
    merge_weight(weight, delta, torch.empty(shape, dtype=ops.dtype, device=ops.device))
    if codec in FUSED_CODECS:
        table = table_of([delta], shape, ops.device, ops.dtype)
        tiles = RowTiles(torch.empty((2, 4), dtype=torch.int32, device=ops.device), 1, 1, frozenset({0}))
        x = torch.empty((1, shape[1]), dtype=ops.dtype, device=ops.device)
        ops.fused(x.new_empty((1, shape[0])), x, weight, table, tiles)
