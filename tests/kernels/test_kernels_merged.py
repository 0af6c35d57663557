import pytest
import torch

from deltazip_kernels import CODECS
from deltazip_kernels.merged import merge_weight
from tests.support.deltas import on_device, random_coded, random_low_rank, random_raw


@pytest.mark.parametrize("shape", [(64, 256), (70, 388)])
@pytest.mark.parametrize("codec", CODECS)
def test_merge_is_the_rounded_sum(codec: str, shape: tuple[int, int], device: torch.device) -> None:
    coded = random_coded(codec, shape)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for dtype, epsilon in ((torch.float32, 2**-23), (torch.float16, 2**-11)):
        out = torch.full(shape, torch.nan, dtype=dtype, device=device)
        merge_weight(base.to(device), on_device(coded.delta(), device), out)
        want = base.double() + coded.dense()
        assert bool(((out.cpu().double() - want).abs() <= epsilon * want.abs() + 1e-7).all())


def test_merge_of_raw_and_low_rank(device: torch.device) -> None:
    base = torch.randn(30, 40, device=device)
    for delta in (random_raw((30, 40), dtype=torch.float32), random_low_rank((30, 40), 4, dtype=torch.float32)):
        out = torch.empty_like(base)
        merge_weight(base, on_device(delta, device), out)
        parts = {k: v.to(device) for k, v in delta.tensors.items()}
        dense = parts["values"] if "values" in parts else parts["up"] @ parts["down"]
        torch.testing.assert_close(out, base + dense)


def test_merge_refuses_other_shapes(device: torch.device) -> None:
    base = torch.zeros(64, 256, device=device)
    with pytest.raises(ValueError, match="contiguous and of shape"):
        merge_weight(base, on_device(random_coded("int4", (64, 128)).delta(), device), base)
    with pytest.raises(ValueError, match="contiguous and of shape"):
        merge_weight(base, on_device(random_coded("int4", (64, 256)).delta(), device), base.T.contiguous().T)
