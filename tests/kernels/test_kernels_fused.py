"""Base and delta added up inside the product, against float64 over the sum rounded to its type."""

import pytest
import torch

from deltazip_kernels import CODECS, PackedDelta
from deltazip_kernels.fused import FusedTile, fused_matmul
from deltazip_kernels.table import DeltaTable
from tests.support.deltas import random_coded, random_raw

TILES = [None, FusedTile(64, 64, 4, 3, ordered=True)]


def to_device(delta: PackedDelta, device: torch.device) -> PackedDelta:
    return PackedDelta(delta.codec, delta.shape, {k: v.to(device) for k, v in delta.tensors.items()})


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tile", TILES)
def test_product_with_the_rounded_sum(codec: str, tile: FusedTile | None, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter cuts bfloat16 off
    shapes = [(130, 512), (70, 512)]
    coded = [random_coded(codec, shapes[0], seed=1), random_coded("int2", shapes[1], seed=2)]
    table = DeltaTable(shapes, 3, device)
    table.set(2, [to_device(c.delta(), device) for c in coded])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(150, 512, generator=generator).to(device, dtype)
    base = (torch.randn(200, 512, generator=generator) * 0.02).to(device, dtype)
    wide = torch.full((150, 208), torch.nan, dtype=dtype, device=device)
    y = wide[:, 8:]
    fused_matmul(y, x, base, table, 2, tile)
    dense = torch.cat([c.dense() for c in coded]).to(device)
    want = x.double() @ (base.double() + dense).to(dtype).double().T
    epsilon = torch.finfo(dtype).eps
    assert bool(((y.double() - want).abs() <= 0.51 * epsilon * want.abs() + 1e-4).all())
    assert bool(wide[:, :8].isnan().all())


def test_refuses_what_it_cannot_fuse(device: torch.device) -> None:
    table = DeltaTable([(64, 256)], 2, device)
    base = torch.zeros(64, 256, dtype=torch.bfloat16, device=device)
    x, y = torch.zeros(2, 256, dtype=torch.bfloat16, device=device), base.new_zeros(2, 64)
    with pytest.raises(ValueError, match="are not fused"):
        fused_matmul(y, x, base, table, 0)
    table.set(0, [to_device(random_raw((64, 256)), device)])
    with pytest.raises(ValueError, match="are not fused"):
        fused_matmul(y, x, base, table, 0)
    with pytest.raises(ValueError, match="base must be contiguous"):
        fused_matmul(y[:, :63], x, base, table, 0)
