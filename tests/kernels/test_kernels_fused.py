"""One product with base and delta, against the product with their sum. The kernel has no form for the interpreter."""

from functools import partial

import pytest
import torch

from deltazip_kernels import PackedDelta
from deltazip_kernels.fused import FUSED_CODECS, FusedProduct, RowTiles, cut_rows, deal
from deltazip_kernels.merged import merge_weight
from deltazip_kernels.table import DeltaTable
from tests.support.deltas import on_device, random_coded

GPU = torch.device("cuda")
SHAPES = {"one": [(256, 512)], "two": [(384, 1024)] * 2, "three": [(512, 4096), (128, 4096), (128, 4096)]}


def random_deltas(codec: str, shapes: list[tuple[int, int]], seed: int = 0) -> list[PackedDelta | None]:
    return [on_device(random_coded(codec, shape, seed + part).delta(), GPU) for part, shape in enumerate(shapes)]


def random_base(shapes: list[tuple[int, int]]) -> torch.Tensor:
    return (torch.randn(sum(n for n, _ in shapes), shapes[0][1], device=GPU) * 0.02).bfloat16()


def table_of(slots: list[list[PackedDelta | None]], shapes: list[tuple[int, int]]) -> DeltaTable:
    table = DeltaTable(shapes, len(slots), GPU)
    for slot, deltas in enumerate(slots):
        table.set(slot, deltas)
    return table


def tiles_of(segments: list[tuple[int, int, int]]) -> RowTiles:
    return cut_rows(segments, partial(torch.tensor, dtype=torch.int32, device=GPU))


def merged(base: torch.Tensor, deltas: list[PackedDelta | None]) -> torch.Tensor:
    out = torch.empty_like(base)
    parts = out.split([delta.shape[0] for delta in deltas if delta])
    for part, delta, start in zip(parts, deltas, base.split([len(part) for part in parts]), strict=True):
        assert delta
        merge_weight(start, delta, part)
    return out


def multiply(
    product: FusedProduct, x: torch.Tensor, base: torch.Tensor, table: DeltaTable, tiles: RowTiles
) -> tuple[torch.Tensor, set[int]]:
    out = torch.full((len(x), len(base)), torch.nan, device=GPU, dtype=torch.bfloat16)
    return out, product(out, x, base, table, tiles)


def check(out: torch.Tensor, x: torch.Tensor, base: torch.Tensor, deltas: list[PackedDelta | None]) -> None:
    want = x.double() @ merged(base, deltas).double().T
    # Sums in float32, one rounding to bfloat16: half a unit in the last of 8 bits.
    assert bool(((out - want).abs() <= 2**-8 * want.abs() + 1e-4 * want.abs().max()).all())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 129, 256, 300, 500, 1000])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("codec", FUSED_CODECS)
def test_the_product_is_that_with_the_sum(codec: str, shapes: list[tuple[int, int]], rows: int) -> None:
    torch.manual_seed(rows)
    base, deltas, product = random_base(shapes), random_deltas(codec, shapes), FusedProduct(GPU)
    x = torch.randn(rows + 64, shapes[0][1], device=GPU).bfloat16()
    case = x, base, table_of([deltas], shapes), tiles_of([(0, 0, rows)])
    out, taken = multiply(product, *case)
    assert taken == {0}
    check(out[:rows], x[:rows], base, deltas)
    assert bool(out[rows:].isnan().all()), "wrote rows of another segment"
    again, _ = multiply(product, *case)
    assert torch.equal(again[:rows], out[:rows]), "programs that share a tile add up in any order"


@pytest.mark.gpu
def test_many_segments_in_one_launch() -> None:
    """Of both codecs, among rows of none, so many that programs take whole tiles and share the last ones."""
    shapes, rows = SHAPES["three"], 7000
    segments = [(0, 0, 700), (3, 700, 1500), (2, 1600, 1860), (1, 1860, 6001), (4, 6009, 6300)]
    slots = [random_deltas(FUSED_CODECS[slot % 2], shapes, 9 * slot) for slot in range(5)]
    mixed = [*random_deltas("int2", shapes[:1]), *random_deltas("int4", shapes[1:])]
    slots[4] = mixed
    base, x = random_base(shapes), torch.randn(rows, shapes[0][1], device=GPU).bfloat16()
    out, taken = multiply(FusedProduct(GPU), x, base, table_of(slots, shapes), tiles_of(segments))
    assert taken == {0, 1, 2, 3, 4}
    inside = torch.zeros(rows, dtype=torch.bool, device=GPU)
    for slot, start, stop in segments:
        check(out[start:stop], x[start:stop], base, slots[slot])
        inside[start:stop] = True
    assert bool(out[~inside].isnan().all())


@pytest.mark.gpu
def test_what_the_kernel_does_not_take() -> None:
    shapes, odd = [(128, 256)], [(64, 256)] * 2
    deltas, product = random_deltas("int2", shapes), FusedProduct(GPU)
    table = table_of([deltas, [None], random_deltas("int3", shapes)], shapes)
    x, base, tiles = torch.zeros(600, 256, device=GPU).bfloat16(), random_base(shapes), [(0, 0, 64), (1, 64, 264)]
    out, taken = multiply(product, x, base, table, tiles_of([*tiles, (2, 264, 564)]))
    assert taken == {0}
    assert bool(out[64:].isnan().all())
    assert not multiply(product, x, base.half(), table, tiles_of(tiles))[1]
    assert not multiply(product, x, random_base(odd), table_of([random_deltas("int2", odd)], odd), tiles_of(tiles))[1]


@pytest.mark.parametrize(
    ("tiles", "dealt"),
    [
        ((64, 0), (128, 64, 0)),
        ((96, 0), (128, 96, 0)),
        ((256, 0), (128, 0, 0)),
        ((448, 0), (128, 64, 0)),
        ((992, 0), (124, 0, 0)),
        ((992, 64), (132, 68, 64)),
        ((6944, 0), (132, 0, 0)),
        ((64, 32), (128, 64, 32)),
        ((144, 0), (128, 144, 0)),
    ],
)
def test_tiles_are_dealt_out_evenly(tiles: tuple[int, int], dealt: tuple[int, int, int]) -> None:
    assert deal(*tiles, 32, 132) == dealt


def test_a_cpu_has_no_such_kernel() -> None:
    product, table = FusedProduct(torch.device("cpu")), DeltaTable([(128, 256)], 1, torch.device("cpu"))
    assert not product.available
    tiles = cut_rows([(0, 0, 300)], torch.tensor)
    assert (tiles.tall, tiles.low, tiles.table.tolist()) == (1, 1, [[0, 0, 300, 0], [0, 256, 300, 0]])
    assert not product(torch.empty(1, 128), torch.empty(1, 256), torch.empty(128, 256).bfloat16(), table, tiles)
