"""What is measured, and the least time that the machine's memory allows for it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, product
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltazip_kernels.bench.data import (
    DEVICE,
    OTHERS,
    SHAPES,
    make_tables,
    random_batch,
    random_delta,
    segments_of,
    work_of,
)
from deltazip_kernels.bench.reading import reading_times
from deltazip_kernels.bench.result import Result
from deltazip_kernels.bench.timing import Launch, graph_times, times_in_turns
from deltazip_kernels.delta import LOW_RANK, RAW, PackedDelta
from deltazip_kernels.fused import FusedProduct, cut_rows
from deltazip_kernels.layout import CODECS
from deltazip_kernels.merged import merge_weight
from deltazip_kernels.plan import Work, plan
from deltazip_kernels.quantize import quantize_rows, rms_norm_quantize, silu_mul_quantize
from deltazip_kernels.table import DeltaTable
from deltazip_kernels.triton_backend import grouped_matmul, low_rank_matmul, raw_matmul

POOL = 768 << 20
"""Bytes of deltas that a timed graph walks through: more than ten times the L2 of an H200."""
RANK = 16
_BUSY = 0.1
"""Seconds for which long segments are multiplied, times the number of versions."""


def products(
    codecs: Sequence[str], batches: Mapping[int, Sequence[int]], linears: Iterable[str] = SHAPES
) -> Iterator[Result]:
    """For every linear, as many distinct deltas of one codec as a key of ``batches``, with so many rows of each.

    ``reference`` is a launch that only reads as many bytes.
    """
    for codec, name, count in product(codecs, linears, batches):
        tables, size = make_tables((SHAPES | OTHERS)[name], [codec] * count, POOL)
        reading = median(reading_times(size, POOL))
        for rows in batches[count]:
            times = _product(tables, [rows] * count)
            yield Result("product", codec, name, f"{count}x{rows}", count * rows, size, times, reading)
        del tables  # before the next ones are made


def mixtures(codec: str, linears: Sequence[str]) -> Iterator[Result]:
    """70 rows over 32 slots as popularity spreads them, 256 over eight as chance does, a giant among single rows, all
    packed codecs in one batch."""
    zipf = [max(1, round(24 / (i + 1) ** 1.5)) for i in range(32)]
    every = [codec for codec in CODECS for _ in range(2)]
    cases = [
        ("zipf", codec, [codec] * 32, zipf),
        ("31 to 33", codec, [codec] * 8, [33, 33, 32, 32, 32, 32, 31, 31]),
        ("27 to 37", codec, [codec] * 8, [37, 35, 34, 33, 31, 30, 29, 27]),
        ("one giant", codec, [codec] * 8, [1, 1, 1, 256, 1, 1, 1, 1]),
        ("2 of each codec, 4 rows", "all", every, [4] * len(every)),
    ]
    for name, (label, title, codecs, lengths) in product(linears, cases):
        tables, size = make_tables(SHAPES[name], codecs, POOL)
        yield Result("mixture", title, name, label, sum(lengths), size, _product(tables, lengths))
        del tables


def _product(tables: Sequence[DeltaTable], lengths: Sequence[int]) -> list[float]:
    """Seconds a product of ``lengths[i]`` rows of slot ``i``."""
    shapes = tables[0].shapes
    x, y = random_batch(sum(lengths), shapes[0][1], sum(n for n, _ in shapes))
    work = work_of(lengths)
    rounded = quantize_rows(x)
    packed = [c for c in tables[0].codecs if c in CODECS]

    def launch(table: DeltaTable) -> None:
        if packed:
            grouped_matmul(y, rounded, table, work, packed)
        if RAW in table.codecs:
            raw_matmul(y, x, table, work)
        if LOW_RANK in table.codecs:
            low_rank_matmul(y, x, table, work, RANK)

    return graph_times([partial(launch, table) for table in tables])


def overheads() -> Iterator[Result]:
    """The work list (once a step) and the rounding of activations (once an input), alone and fused."""
    for rows in (8, 32, 256):
        segments = segments_of([max(1, rows // 32)] * min(rows, 32))
        yield Result("plan", "", "", "32", rows, 0, graph_times([partial(plan, segments, rows)] * 16))
        for columns in (4096, 14336):
            x, _ = random_batch(rows, columns, 1)
            times = graph_times([partial(quantize_rows, x)] * 16)
            yield Result("quantize", "", str(columns), "", rows, 3 * x.numel(), times)
        weights = torch.ones((32, 4096), device=DEVICE, dtype=torch.bfloat16)
        which = (torch.arange(rows, device=DEVICE) % 32).int()
        x, residual = random_batch(rows, 4096, 4096)
        times = graph_times([partial(rms_norm_quantize, x, weights, which, 1e-5, residual)] * 16)
        yield Result("rms_norm_quantize", "", "4096", "", rows, 9 * x.numel(), times)
        gate_up, _ = random_batch(rows, 2 * 14336, 1)
        times = graph_times([partial(silu_mul_quantize, gate_up)] * 16)
        yield Result("silu_mul_quantize", "", "14336", "", rows, 7 * rows * 14336, times)


def long_segments(codecs: Sequence[str], batches: Sequence[Sequence[int]]) -> Iterator[Result]:
    """Versions of so many rows: the product beside the base GEMM, one GEMM for each over a merged scratch weight, and
    the product that merges in registers.

    ``reference`` is the base GEMM alone, for all rows; all totals include the base's part.
    """
    fused = FusedProduct(DEVICE)
    for name, shapes in SHAPES.items():
        outputs, columns = sum(n for n, _ in shapes), shapes[0][1]
        # Two weights in turn, so that the next one is not in the L2.
        bases = [torch.randn((outputs, columns), device=DEVICE, dtype=torch.bfloat16) * 0.02 for _ in range(2)]
        scratch = torch.empty_like(bases[0])
        for lengths, codec in product(batches, codecs):
            x, y = random_batch(sum(lengths), columns, outputs)
            work = work_of(lengths)
            tables = [make_tables(shapes, [codec] * len(lengths), 0) for _ in bases]
            whole = random_delta(codec, (outputs, columns))
            ends = list(accumulate(lengths))
            segments = [(slot, end - lengths[slot], end) for slot, end in enumerate(ends)]
            tiles = cut_rows(segments, partial(torch.tensor, dtype=torch.int32, device=DEVICE))
            parts = list(zip(x.split(lengths), y.split(lengths), strict=True))
            ways: dict[str, list[Launch]] = {
                "alone": [partial(linear, x, base) for base in bases],
                "merged": [partial(_merged, parts, base, whole, scratch) for base in bases],
                "fused": [
                    partial(fused, y, x, base, table, tiles) for base, ((table,), _) in zip(bases, tables, strict=True)
                ],
            }
            if len(lengths) == 1:
                ways["beside"] = [partial(_beside, x, y, base, tables[0][0][0], work, codec) for base in bases]
            times = times_in_turns({kind: launches * 3 for kind, launches in ways.items()}, _BUSY * len(lengths))
            alone = median(times.pop("alone"))
            label = "+".join(map(str, lengths))
            for kind, samples in times.items():
                yield Result(kind, codec, name, label, len(x), tables[0][1], samples, alone)


def _beside(x: Tensor, y: Tensor, base: Tensor, table: DeltaTable, work: Work, codec: str) -> None:
    linear(x, base)
    rounded = quantize_rows(x)
    grouped_matmul(y, rounded, table, work, [codec])


def _merged(parts: Sequence[tuple[Tensor, Tensor]], base: Tensor, delta: PackedDelta, scratch: Tensor) -> None:
    for x, y in parts:
        merge_weight(base, delta, scratch)
        torch.matmul(x, scratch.T, out=y)
