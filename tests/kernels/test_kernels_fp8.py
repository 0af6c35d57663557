"""Matrices in fp8, the passes that make them, and the base's products."""

import pytest
import torch
from torch import Tensor

from deltazip_kernels import PackedDelta, skinny
from deltazip_kernels.fp8 import Fp8Matrix, fp8_matmul_torch, round_to_fp8
from deltazip_kernels.merged import merge_weight
from deltazip_kernels.quantize import quantize_rows, rms_norm_quantize, silu_mul_quantize
from deltazip_kernels.skinny import MOST_ROWS, BaseProduct
from tests.support.deltas import random_coded, random_low_rank, random_raw


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_keeps_four_bits_and_the_largest_of_a_row() -> None:
    x = normal(40, 96) * 10.0 ** torch.arange(-20, 20)[:, None]
    x[7] = 0
    matrix = round_to_fp8(x)
    back = matrix.dequantize(torch.float64)
    top = x.double().abs().amax(1, keepdim=True)
    assert ((back - x).abs() <= x.double().abs() / 16 + top * 2**-10 / 448 * 1.01).all()
    torch.testing.assert_close(back.abs().amax(1), top[:, 0], rtol=1e-6, atol=0)
    assert not back[7].any()


def test_views_share_their_memory() -> None:
    matrix = round_to_fp8(normal(8, 32))
    part = matrix.rows(2, 5)
    part.fill(torch.ones(3, 32))
    assert matrix.shape == (8, 32)
    assert (matrix.dequantize(torch.float32)[2:5] == 1).all()


def test_a_large_matrix_is_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = round_to_fp8(normal(50, 16))
    monkeypatch.setattr("deltazip_kernels.fp8._CHUNK", 100)
    pieces = round_to_fp8(normal(50, 16))
    assert torch.equal(whole.values.view(torch.uint8), pieces.values.view(torch.uint8))
    assert torch.equal(whole.dequantize(torch.bfloat16), pieces.dequantize(torch.bfloat16))


def assert_rounds(rows: Fp8Matrix | None, x: Tensor) -> None:
    assert rows is not None
    want = round_to_fp8(x)
    torch.testing.assert_close(rows.scales, want.scales, rtol=1e-6, atol=0)
    # Triton's interpreter halves what should round up to a power of two, whose last three bits are zero.
    checked = (
        (want.values.view(torch.uint8) & 7 != 0) if x.device.type == "cpu" else torch.ones_like(x, dtype=torch.bool)
    )
    found, wanted = (matrix.values.float()[checked] for matrix in (rows, want))
    # Quotients that lie on the border of two values may go either way.
    assert (found != wanted).float().mean() < 0.01
    torch.testing.assert_close(found, wanted, rtol=0.15, atol=2**-9)


@pytest.mark.parametrize("int8", [5, 2, 0])
@pytest.mark.parametrize("columns", [128, 304])
def test_passes_round_what_they_make(columns: int, device: torch.device, int8: int) -> None:
    x = normal(5, columns).to(device)
    weights, which = normal(2, columns, seed=1).to(device), torch.tensor([0, 1, 1, 0, 0], dtype=torch.int32).to(device)
    normed, rows = rms_norm_quantize(x, weights, which, 1e-5, fp8=True, int8=int8)
    assert_rounds(rows.fp8, normed)
    activated, rows = silu_mul_quantize(torch.cat((x, x), 1), fp8=True, int8=int8)
    assert_rounds(rows.fp8, activated)
    assert_rounds(quantize_rows(x, fp8=True, int8=int8).fp8, x)
    assert len(rows.values) == int8
    assert quantize_rows(x).fp8 is None


SHAPES = [(64, 128), (128, 512), (192, 1792), (80, 112)]
"""Some that the kernel cuts along K, some that it does not take."""


@pytest.mark.parametrize("rows", [1, 5, 29, MOST_ROWS, MOST_ROWS + 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_in_fp8(shape: tuple[int, int], rows: int, device: torch.device) -> None:
    x, weight = round_to_fp8(normal(rows, shape[1]).to(device)), round_to_fp8(normal(*shape, seed=1).to(device))
    product = BaseProduct(device)
    outputs = [torch.full((rows, shape[0]), torch.nan, dtype=torch.bfloat16, device=device) for _ in range(2)]
    for y in outputs:
        product(y, x, weight)
    want = fp8_matmul_torch(x, weight, torch.float32)
    assert float((outputs[0].float() - want).norm() / want.norm()) < 4e-3
    assert torch.equal(*outputs)


@pytest.mark.parametrize("stop", [9, 3 + MOST_ROWS + 7])
def test_product_of_some_rows_of_a_batch(stop: int, device: torch.device) -> None:
    x, weight = round_to_fp8(normal(90, 512).to(device)), round_to_fp8(normal(128, 512, seed=1).to(device))
    y = torch.zeros((90, 128), dtype=torch.bfloat16, device=device)
    BaseProduct(device)(y[3:stop], x.rows(3, stop), weight)
    want = fp8_matmul_torch(x, weight, torch.float32)
    assert float((y[3:stop].float() - want[3:stop]).norm() / want[3:stop].norm()) < 4e-3
    assert not y[:3].any()
    assert not y[stop:].any()


@pytest.mark.parametrize("rows", [3, 20, MOST_ROWS, MOST_ROWS + 1])
def test_product_in_16_bits(rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "FASTER", {(128, 512): MOST_ROWS})
    launched: list[skinny.Cut] = []
    launch = BaseProduct._launch
    monkeypatch.setattr(BaseProduct, "_launch", lambda *args: (launched.append(args[4]), launch(*args)))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    wide, weight = (normal(size, 512, seed=size).to(device, dtype) for size in (rows, 128))
    product, outputs = BaseProduct(device), []
    for x in (wide, wide, wide.T.contiguous().T):  # columns that are not adjacent are left to torch
        outputs.append(torch.full((rows, 128), torch.nan, dtype=dtype, device=device))
        product(outputs[-1], x, weight)
        torch.testing.assert_close(outputs[-1].float(), x.float() @ weight.float().T, rtol=2**-7, atol=0.05)
    assert torch.equal(outputs[0], outputs[1])
    assert launched == ([skinny.Cut(4, 128, 6)] * 2 if rows <= MOST_ROWS else [])


@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("rows", [1, 17, 64])
@pytest.mark.parametrize("shape", [*skinny.FASTER, (64, 128), (192, 1792), (4608, 3584), (128256, 4096)])
def test_a_cut_covers_the_weight_and_fits_a_multiprocessor(shape: tuple[int, int], rows: int, itemsize: int) -> None:
    chosen = skinny.cut(rows, shape, itemsize)
    assert chosen is not None
    assert shape[1] % (chosen.parts * chosen.columns) == 0
    assert chosen.stages * chosen.columns * itemsize * (64 + skinny.padded(rows)) <= 227 << 10
    assert shape not in skinny.FASTER or shape[0] // 64 * chosen.parts >= 128


@pytest.mark.parametrize(("rows", "shape"), [(0, (64, 128)), (65, (64, 128)), (1, (80, 128)), (1, (64, 112))])
def test_what_the_kernel_does_not_take(rows: int, shape: tuple[int, int]) -> None:
    assert skinny.cut(rows, shape, 1) is None


@pytest.mark.parametrize("codec", ["int4", "int2"])
def test_merge_over_fp8(codec: str, device: torch.device) -> None:
    coded = random_coded(codec, (64, 256))
    delta = PackedDelta(codec, (64, 256), {k: v.to(device) for k, v in coded.delta().tensors.items()})
    base = round_to_fp8(normal(64, 256).to(device))
    out = torch.full((64, 256), torch.nan, device=device)
    merge_weight(base, delta, out)
    want = base.dequantize(torch.float64).cpu() + coded.dense()
    torch.testing.assert_close(out.cpu().double(), want, rtol=2**-22, atol=1e-6)


def test_merge_of_raw_and_low_rank_over_fp8(device: torch.device) -> None:
    base = round_to_fp8(normal(32, 48).to(device))
    for delta in (random_raw((32, 48), dtype=torch.float32), random_low_rank((32, 48), 4, dtype=torch.float32)):
        parts = {k: v.to(device) for k, v in delta.tensors.items()}
        out = torch.empty(32, 48, device=device)
        merge_weight(base, PackedDelta(delta.codec, delta.shape, parts), out)
        dense = parts["values"] if "values" in parts else parts["up"] @ parts["down"]
        torch.testing.assert_close(out, base.dequantize(torch.float32) + dense)
