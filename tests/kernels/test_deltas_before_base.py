"""Steps of few rows, in which the base's product starts beside those with deltas and adds what they leave."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltazip_kernels import PackedDelta, quantize, skinny, triton_backend
from deltazip_kernels.fp8 import round_to_fp8
from deltazip_kernels.skinny import BaseProduct
from deltazip_ray.layers.activations import Activations, BaseWeight
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.layers.triton_ops import TritonOps
from deltazip_ray.layers.writes import Writes
from tests.support.deltas import on_device, random_coded, random_low_rank, random_raw

SHAPES = [(128, 512), (64, 512)]
RUNS = [(-1, 2), (0, 3), (1, 1), (2, 9), (3, 1), (4, 1)]
X = torch.randn((sum(rows for _, rows in RUNS), 512), generator=torch.Generator().manual_seed(0))
BASE = torch.randn((192, 512), generator=torch.Generator().manual_seed(1)) * 0.02


def make_ops(device: torch.device, monkeypatch: pytest.MonkeyPatch, *, fp8: bool = False) -> TritonOps:
    """A device's operations for which the kernel of the base's product takes the shape of ``BASE``."""
    monkeypatch.setattr(skinny, "FASTER", {(192, 512): skinny.MOST_ROWS})
    return TritonOps(device, torch.bfloat16 if device.type == "cuda" else torch.float16, fp8=fp8)


def deltas(dtype: torch.dtype) -> list[Sequence[PackedDelta | None]]:
    """By slot, those of both parts: several launches, a part that has none, a slot that is empty."""
    whole, part = SHAPES
    return [
        [random_coded("int2", whole).delta(), random_coded("int4", part).delta()],
        [random_raw(whole, dtype=dtype), None],
        [None, random_low_rank(part, 8, dtype=dtype)],
        [None, None],
        [random_low_rank(whole, 8, dtype=dtype), random_coded("int2", part).delta()],
    ]


def product(ops: LayerOps, x: Activations, weight: BaseWeight, held: Sequence[Sequence[PackedDelta | None]]) -> Tensor:
    stack, writes = ops.stack(SHAPES, len(RUNS) - 1), Writes()
    for slot, parts in enumerate(held):
        for part, delta in enumerate(parts):
            stack.put(slot, part, delta and on_device(delta, x.values.device), writes)
    writes.send()
    rows = ops.rows(RUNS, x.values.device)
    outputs = [ops.linear(weight, x, stack, rows) for _ in range(2)]
    assert torch.equal(*outputs)
    return outputs[0]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("which", [slice(0), slice(None)])
def test_rows_get_base_and_delta(
    which: slice, fp8: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = make_ops(device, monkeypatch, fp8=fp8)
    x, base = (matrix.to(device, ops.dtype) for matrix in (X, BASE))
    held = deltas(ops.dtype)[which]
    rounded = replace(quantize.quantize_rows(x), fp8=round_to_fp8(x)) if fp8 else None
    weight = round_to_fp8(base) if fp8 else base
    y = product(ops, Activations(x, rounded), weight, held)
    want = product(LayerOps(), Activations(x.float()), weight if fp8 else base.float(), held)
    assert float((y - want).norm() / want.norm()) < 0.01
    assert not ops.deltas.any()


def test_a_step_that_fails_leaves_nothing_to_the_next(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = make_ops(device, monkeypatch)
    monkeypatch.setattr(BaseProduct, "_launch", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        product(ops, Activations(X.to(device, ops.dtype)), BASE.to(device, ops.dtype), deltas(ops.dtype))
    assert not ops.deltas.any()


def fail(*_: object) -> None:
    raise RuntimeError("no memory")


@pytest.mark.gpu
@pytest.mark.parametrize("codecs", [["int2"], ["low_rank"], ["int2", "low_rank"], ["raw", "int2"]])
def test_no_bit_depends_on_what_overlaps(
    codecs: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains in which each launch needs what those ahead wrote, against launches that wait for each other."""
    monkeypatch.setattr(skinny, "FASTER", {(2048, 2048): skinny.MOST_ROWS})
    ops, shape, writes = TritonOps(device, torch.bfloat16), (2048, 2048), Writes()
    stack = ops.stack([shape], len(codecs))
    made = {
        "int2": random_coded("int2", shape).delta(),
        "low_rank": random_low_rank(shape, 16),
        "raw": random_raw(shape),
    }
    for slot, codec in enumerate(codecs):
        stack.put(slot, 0, on_device(made[codec], device), writes)
    writes.send()
    rows = ops.rows([(-1, 3), *((slot, 16) for slot in range(len(codecs)))], device)
    start = torch.randn((len(rows.index), 2048), device=device).bfloat16()
    weight = torch.randn(shape, device=device).bfloat16() * 0.02
    ones = torch.ones((len(codecs) + 1, 2048), device=device, dtype=torch.bfloat16)

    def chain() -> Tensor:
        stream, update = start.clone(), start
        for _ in range(20):
            update = ops.linear(weight, ops.rms_norm(stream, ones, rows, 1e-5, update), stack, rows)
            update = ops.linear(weight, Activations(update), stack, rows)  # rounded by a launch of its own
        return update

    overlapped = [chain() for _ in range(10)]
    for module in (quantize, skinny, triton_backend):
        monkeypatch.setattr(module, "overlap", lambda *_, **__: {"OVERLAP": False})
    monkeypatch.setattr(quantize, "_options", quantize._options.__wrapped__)
    plain = chain()
    assert bool(plain.isfinite().all())
    assert all(torch.equal(x, plain) for x in overlapped)
    assert not ops.deltas.any()
