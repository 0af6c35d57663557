"""The passes that quantize what they make: their outputs against torch, their int8 rows against those outputs."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from deltazip_kernels.quantize import (
    MAX_COLUMNS,
    QuantizedRows,
    gelu_mul_quantize,
    layer_norm_quantize,
    quantize_rows,
    rms_norm_quantize,
    silu_mul_quantize,
)

DTYPES = [torch.float32, torch.float16]


def assert_quantizes(rows: QuantizedRows, x: Tensor) -> None:
    alone = quantize_rows(x)
    assert torch.equal(rows.values, alone.values)
    assert torch.equal(rows.scales, alone.scales)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 2**-9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [128, 300, 2100])
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_gated(act: str, dtype: torch.dtype, columns: int, device: torch.device) -> None:
    wide = torch.randn(7, 2 * columns + 5, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    gate_up = 3 * wide[:, : 2 * columns]
    out, rows = silu_mul_quantize(gate_up) if act == "silu" else gelu_mul_quantize(gate_up)
    gate, up = gate_up.split(columns, dim=1)
    want = (silu(gate) if act == "silu" else gelu(gate, approximate="tanh")) * up
    torch.testing.assert_close(out, want, rtol=tolerance(dtype), atol=tolerance(dtype))
    assert_quantizes(rows, out)
    for count in (0, 3):
        again, first = (silu_mul_quantize if act == "silu" else gelu_mul_quantize)(gate_up, int8=count)
        assert torch.equal(again, out)
        assert torch.equal(first.values, rows.values[:count])
        assert torch.equal(first.scales, rows.scales[:count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma", "layer norm"])
def test_norm_of_each_rows_version(kind: str, dtype: torch.dtype, residual: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 300, generator=generator).to(device, dtype) + 1
    sums = torch.randn(9, 300, generator=generator).to(device, dtype) if residual else None
    weights, biases = torch.randn(2, 3, 300, generator=generator).to(device, dtype)
    which = torch.tensor([0, 0, 2, 1, 1, 1, 0, 2, 2], dtype=torch.int32, device=device)
    total = x if sums is None else x + sums
    scaled = total.float() * (total.float().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    own = weights[which.long()]
    if kind == "llama":
        want = own * scaled.to(dtype)
        out, rows = rms_norm_quantize(x, weights, which, 1e-5, sums)
    elif kind == "gemma":
        want = (scaled * (1 + own.float())).to(dtype)
        out, rows = rms_norm_quantize(x, weights, which, 1e-5, sums, offset=True)
    else:
        want = (layer_norm(total.float(), (300,), eps=1e-5) * own + biases[which.long()]).to(dtype)
        out, rows = layer_norm_quantize(x, weights, biases, which, 1e-5, sums)
    torch.testing.assert_close(out, want, rtol=2 * tolerance(dtype), atol=2 * tolerance(dtype))
    if sums is not None:
        assert torch.equal(sums, total)
    assert_quantizes(rows, out)


def test_rows_that_do_not_fit_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="too long"):
        quantize_rows(torch.zeros(1, MAX_COLUMNS + 1, device=device))


def test_no_rows(device: torch.device) -> None:
    out, rows = silu_mul_quantize(torch.zeros(0, 256, device=device))
    assert out.shape == (0, 128)
    assert rows.values.shape == (0, 128)
