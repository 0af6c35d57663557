"""The Triton backend of the grouped delta product: launches, and the operator over them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltazip_kernels.delta import LOW_RANK, RAW, PackedDelta, Segments
from deltazip_kernels.device.dense import expand, raw, shrink
from deltazip_kernels.device.grouped import MOST_SPLITS, grouped
from deltazip_kernels.launch import ceil_div, launch, overlap, power_of_2
from deltazip_kernels.layout import CODECS, GROUP
from deltazip_kernels.plan import COUNTERS, MANY, MORE, PARTIALS, SOME, Work, plan
from deltazip_kernels.quantize import QuantizedRows, quantize_rows
from deltazip_kernels.table import CODEC_IDS, DeltaTable, table_of

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_INNER_CHUNK = 512
"""Columns of K that one program of a low-rank product adds up."""


@dataclass(frozen=True)
class Tile:
    """How a launch is cut: rows of the weight for each program, warps, stages of the pipeline along K, and the number
    of programs that share K."""

    rows: int
    warps: int
    stages: int
    splits: int = 1


SPARSE, DENSE, LONG = Tile(64, 2, 4), Tile(128, 4, 4), Tile(64, 4, 3)
"""For items of few rows, of up to ``MORE``, and of up to ``MANY``. On an H200 these are the best tiles, or nearly so,
for every codec and every linear of an 8B model."""
_THIN = Tile(64, 1, 3)
_THIN_CODECS = frozenset({"int1", "sparse24_int2"})
_PLENTY = 2048  # programs
_FEW = Tile(64, 4, 4)
"""For launches in which wider tiles would leave multiprocessors idle."""
_BATCHES = {SOME: (8, 16), MORE: (8, 32), MANY: (8, 32, 64)}
"""By the maximum rows of an item: the numbers of rows that a kernel has code for."""
_CROWD, _ENOUGH = 512, 128
"""Up to ``_CROWD`` programs, more warps pay, and so does sharing K if items have up to ``SOME`` rows or walks along K
are long. Otherwise sums cost more, and sharing pays up to ``_ENOUGH`` programs."""
_LONG_WALK, _LEAST_WALK = 28, 4
"""Steps of two groups that a program takes along K: what is long, and the least that is worth a program."""


def grouped_matmul(
    y: Tensor,
    x: QuantizedRows,
    table: DeltaTable,
    work: Work,
    codecs: Sequence[str],
    tile: Tile | None = None,
    *,
    starts_early: bool = False,
) -> None:
    """Add the products of ``work``'s rows with packed deltas to ``y`` [T, sum of the table's N], in one launch.

    Slots whose codec is not in ``codecs`` are skipped. ``starts_early``: start while the launch ahead ends, which pays
    behind a small one, but not behind a GEMM. That launch must not be the one that writes ``work``.
    Raises ValueError for a ``y`` of another shape, and for a ``tile`` that shares more than ``work`` has room for.
    """
    _check(y, table)
    tile = tile or _tile(table, work, codecs)
    rows, tiles = _cut(table.shapes, tile.rows)
    shared = sum(tiles) * len(work.items) if tile.splits > 1 else 0
    if tile.splits > MOST_SPLITS.value or shared > COUNTERS or shared * tile.splits * tile.rows * work.batch > PARTIALS:
        raise ValueError(f"{shared} tiles are too many to be shared by {tile.splits} programs each")
    launch(
        grouped,
        (sum(tiles), len(work.items), tile.splits),
        y,
        y.stride(0),
        x.values,
        x.scales,
        work.items,
        table.entries,
        work.partials,
        work.arrived,
        _padded(rows),
        _padded(tiles),
        len(rows),
        GROUPS=ceil_div(x.columns, GROUP),
        CODECS=tuple(CODEC_IDS[name] for name in codecs),
        SPLIT=tile.splits > 1,
        BN=tile.rows,
        BATCHES=_BATCHES[work.batch],
        STAGES=tile.stages,
        PLAIN=triton.knobs.runtime.interpret,
        num_warps=tile.warps,
        **overlap(y.device, starts_early=starts_early),
    )


def raw_matmul(y: Tensor, x: Tensor, table: DeltaTable, work: Work) -> None:
    """Likewise for raw deltas, in one launch; ``x`` [T, K] is not rounded."""
    _check(y, table)
    rows, tiles = _cut(table.shapes, 64)
    launch(
        raw,
        (sum(tiles), work.items.shape[0]),
        y,
        y.stride(0),
        x,
        x.stride(0),
        work.items,
        table.entries,
        K=x.shape[1],
        ROWS=rows,
        TILES=tiles,
        DTYPE=DTYPES[table.dtype],
        BN=64,
        BM=work.batch,
        BK=64,
        PLAIN=triton.knobs.runtime.interpret,
        num_warps=4,
        num_stages=4,
    )


def low_rank_matmul(y: Tensor, x: Tensor, table: DeltaTable, work: Work, rank: int) -> None:
    """Likewise for low-rank deltas of up to ``rank``, in two launches."""
    _check(y, table)
    width = max(16, power_of_2(rank))
    batch, numbers = (8, 16384) if work.sparse else (work.batch, 8192)
    block = numbers // width
    rows, tiles = _cut(table.shapes, block)
    chunks = ceil_div(x.shape[1], _INNER_CHUNK)
    few = len(rows) * chunks * len(work.items) <= _CROWD
    inner = torch.empty((len(rows), chunks, x.shape[0], width), dtype=torch.float32, device=x.device)
    launch(
        shrink,
        (len(rows) * chunks, work.items.shape[0]),
        inner,
        x.shape[0],
        x,
        x.stride(0),
        work.items,
        table.entries,
        K=x.shape[1],
        PARTS=len(rows),
        CHUNK=_INNER_CHUNK,
        DTYPE=DTYPES[table.dtype],
        R=width,
        BM=batch,
        BK=min(128, 4096 // width),
        PLAIN=triton.knobs.runtime.interpret,
        num_warps=(2 if few else 1) if work.sparse else 4,
        num_stages=4,
        **overlap(y.device),
    )
    launch(
        expand,
        (sum(tiles), work.items.shape[0]),
        y,
        y.stride(0),
        inner,
        x.shape[0],
        work.items,
        table.entries,
        ROWS=rows,
        TILES=tiles,
        CHUNKS=chunks,
        DTYPE=DTYPES[table.dtype],
        R=width,
        BN=block,
        BM=batch,
        PLAIN=triton.knobs.runtime.interpret,
        num_warps=8,
        **overlap(y.device),
    )


def delta_matmul_triton(y: Tensor, x: Tensor, deltas: Sequence[PackedDelta | None], segments: Segments) -> None:
    """:func:`deltazip_kernels.ops.delta_matmul` with activations rounded to int8, one scale a row, for packed deltas.

    Makes the table, the work list and the rounded activations anew; an engine makes them once a slot, a step and an
    input, and calls the launches above.
    """
    x = x.contiguous()
    table = table_of(deltas, (y.shape[1], x.shape[1]), x.device, x.dtype)
    packed = [name for name in table.codecs if name in CODECS]
    work = plan(segments, x.shape[0])
    if work is None:
        return
    rounded = quantize_rows(x)  # also stands between the plan and launches that read it early
    if packed:
        grouped_matmul(y, rounded, table, work, packed)
    if RAW in table.codecs:
        raw_matmul(y, x, table, work)
    if LOW_RANK in table.codecs:
        ranks = [d.tensors["down"].shape[0] for d in deltas if d is not None and d.codec == LOW_RANK]
        low_rank_matmul(y, x, table, work, max(ranks))


def _tile(table: DeltaTable, work: Work, codecs: Sequence[str]) -> Tile:
    return _tile_of(table.shapes, len(work.items), work.batch, work.sparse, _THIN_CODECS.issuperset(codecs))


@cache
def _tile_of(shapes: tuple[tuple[int, int], ...], items: int, batch: int, sparse: bool, thin: bool) -> Tile:
    """The tile of a launch. ``thin``: all codecs are so thin that instructions bind them; one warp needs the fewest."""
    programs = sum(_cut(shapes, SPARSE.rows)[1]) * items
    if batch == MANY:
        tile = LONG
    elif 2 * programs <= _CROWD:
        tile = _FEW
    elif not sparse:
        tile = DENSE
    else:
        tile = _THIN if programs >= _PLENTY and thin else SPARSE
    return replace(tile, splits=_splits(programs, shapes[0][1], batch))


def _splits(programs: int, columns: int, batch: int) -> int:
    """How many programs share a tile along K: with few, each would walk far while other multiprocessors are idle."""
    steps, splits = columns // (2 * GROUP), 1
    while splits < MOST_SPLITS.value and steps // (2 * splits) >= _LEAST_WALK:
        most = _CROWD if batch == SOME or steps // splits >= _LONG_WALK else _ENOUGH
        if 2 * splits * programs > most:
            break
        splits *= 2
    return splits


def _check(y: Tensor, table: DeltaTable) -> None:
    outputs = sum(width for width, _ in table.shapes)
    if y.dim() != 2 or y.shape[1] != outputs or y.stride(1) != 1:
        raise ValueError(f"y must be [T, {outputs}] with adjacent columns, not {tuple(y.shape)}, strides {y.stride()}")


@cache
def _cut(shapes: tuple[tuple[int, int], ...], rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The outputs of each part, and the number of blocks of ``rows`` that cover them."""
    widths = tuple(width for width, _ in shapes)
    return widths, tuple(ceil_div(width, rows) for width in widths)


@cache
def _padded(parts: tuple[int, ...]) -> tuple[int, ...]:
    """``parts`` padded with zeros to three, so that stacks of one, two and three linears share compiled kernels."""
    return (*parts, 0, 0)[: max(3, len(parts))]
