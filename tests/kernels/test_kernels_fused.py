"""One product with base and delta, against the product with their sum. The kernel has no form for the interpreter."""

import pytest
import torch

from deltazip_kernels import PackedDelta
from deltazip_kernels.fused import FUSED_CODECS, FusedProduct, deal
from deltazip_kernels.merged import merge_weight
from tests.support.deltas import random_coded

GPU = torch.device("cuda")
SHAPES = {"one": [(256, 512)], "two": [(384, 1024)] * 2, "three": [(512, 4096), (128, 4096), (128, 4096)]}


def random_deltas(codec: str, shapes: list[tuple[int, int]]) -> list[PackedDelta]:
    coded = [random_coded(codec, shape, seed) for seed, shape in enumerate(shapes)]
    return [
        PackedDelta(codec, shape, {name: tensor.to(GPU) for name, tensor in one.packed().items()})
        for shape, one in zip(shapes, coded, strict=True)
    ]


def random_base(shapes: list[tuple[int, int]]) -> torch.Tensor:
    return (torch.randn(sum(n for n, _ in shapes), shapes[0][1], device=GPU) * 0.02).bfloat16()


def merged(base: torch.Tensor, deltas: list[PackedDelta]) -> torch.Tensor:
    out = torch.empty_like(base)
    starts = [0]
    for delta in deltas:
        starts.append(starts[-1] + delta.shape[0])
        merge_weight(base[starts[-2] : starts[-1]], delta, out[starts[-2] : starts[-1]])
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 129, 256, 500, 1000])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("codec", FUSED_CODECS)
def test_the_product_is_that_with_the_sum(codec: str, shapes: list[tuple[int, int]], rows: int) -> None:
    torch.manual_seed(rows)
    base, deltas, product = random_base(shapes), random_deltas(codec, shapes), FusedProduct(GPU)
    x = torch.randn(rows, shapes[0][1], device=GPU).bfloat16()
    out = torch.full((rows + 64, len(base)), torch.nan, device=GPU, dtype=torch.bfloat16)
    assert product(out[:rows], x, base, deltas)
    want = x.double() @ merged(base, deltas).double().T
    # Sums in float32, one rounding to bfloat16: half a unit in the last of 8 bits.
    assert bool(((out[:rows] - want).abs() <= 2**-8 * want.abs() + 1e-4 * want.abs().max()).all())
    assert bool(out[rows:].isnan().all()), "wrote rows that do not exist"
    again = torch.empty_like(out)
    assert product(again[:rows], x, base, deltas)
    assert torch.equal(again[:rows], out[:rows]), "programs that share a tile add up in any order"


@pytest.mark.gpu
def test_what_the_kernel_does_not_take() -> None:
    base, deltas = random_base([(128, 256)]), random_deltas("int2", [(128, 256)])
    x, product = torch.zeros(64, 256, device=GPU).bfloat16(), FusedProduct(GPU)
    y = torch.empty(64, 128, device=GPU, dtype=torch.bfloat16)
    assert product(y, x, base, deltas)
    assert not product(y, x, base, [None])
    assert not product(y, x, base, random_deltas("int3", [(128, 256)]))
    assert not product(y, x, base.half(), deltas)
    assert not product(y, x, random_base([(64, 256)] * 2), random_deltas("int2", [(64, 256)] * 2))


@pytest.mark.parametrize(("tiles", "programs"), [(64, 128), (96, 96), (256, 128), (448, 132), (1792, 128), (200, 132)])
def test_tiles_are_dealt_out_evenly(tiles: int, programs: int) -> None:
    assert deal(tiles, 132) == programs


def test_a_cpu_has_no_such_kernel() -> None:
    product = FusedProduct(torch.device("cpu"))
    assert not product.available
    assert not product(torch.empty(1, 128), torch.empty(1, 256), torch.empty(128, 256, dtype=torch.bfloat16), [None])
