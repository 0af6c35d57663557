"""Which segments get a product of their own, and that all rows of a step get theirs."""

import pytest
import torch

from deltazip_kernels.fused import FUSED_ALONE_ROWS, FUSED_ROWS, SCRATCH_ROWS, FusedProduct
from deltazip_kernels.merged import MERGE_ROWS
from deltazip_ray.layers.activations import Activations
from deltazip_ray.layers.triton_ops import TritonOps
from deltazip_ray.layers.writes import Writes
from tests.support.deltas import on_device, random_coded, random_low_rank

LIMITS = (FUSED_ALONE_ROWS, FUSED_ROWS, MERGE_ROWS)


def least(ops: TritonOps, *, alone: bool) -> int:
    """Rows of slot 0 that make a long segment."""
    others = [] if alone else [(-1, 1)]
    lengths = [rows for limit in LIMITS for rows in (limit - 1, limit)]
    return min(rows for rows in lengths if ops.rows([(0, rows), *others], ops.device).merged)


def test_how_long_is_long_depends_on_the_version_and_its_company(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedProduct, "available", True)
    ops = TritonOps(device, torch.bfloat16)
    lora, int2 = random_low_rank((64, 128), 8), random_coded("int2", (64, 128)).delta()
    ops.segments.replace(0, None, int2)
    assert (least(ops, alone=True), least(ops, alone=False)) == (FUSED_ALONE_ROWS, FUSED_ROWS)
    ops.segments.replace(0, int2, lora)
    assert (least(ops, alone=True), least(ops, alone=False)) == (MERGE_ROWS, MERGE_ROWS)
    ops.segments.replace(0, lora, None)
    assert least(ops, alone=False) == FUSED_ROWS
    for other in (TritonOps(ops.device, torch.float16), TritonOps(ops.device, torch.bfloat16, fp8=True)):
        assert least(other, alone=True) == MERGE_ROWS


def test_rows_up_to_the_last_short_segment_are_rounded(device: torch.device) -> None:
    ops = TritonOps(device, torch.bfloat16)
    long = MERGE_ROWS + 1
    assert [ops.rows(runs, device).rounded for runs in ([(-1, 7), (0, 20), (1, long)], [(0, long)], [(-1, 9)])] == [
        27,
        0,
        0,
    ]


@pytest.mark.parametrize("codecs", [["int4"], ["int2"], ["int4", "int2"]])
def test_very_long_segments_have_a_scratch_weight(
    codecs: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedProduct, "available", True)
    ops = TritonOps(device, torch.bfloat16)
    for codec in codecs:
        ops.segments.replace(0, None, random_coded(codec, (64, 128)).delta())
    limit = max(SCRATCH_ROWS[codec] for codec in codecs)
    assert ops.rows([(0, limit - 1)], device).tiles is not None
    assert ops.rows([(0, limit)], device).tiles is None
    assert ops.rows([(0, limit)], device).merged


def test_all_long_segments_of_a_version_go_one_way(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes and prompts: the product in registers tells of versions, not of segments, that it has done them."""
    monkeypatch.setattr(FusedProduct, "available", True)
    ops = TritonOps(device, torch.bfloat16)
    for slot in (0, 1):
        ops.segments.replace(slot, None, random_coded("int4", (64, 128)).delta())
    step = ops.rows([(0, FUSED_ROWS), (1, FUSED_ROWS), (0, SCRATCH_ROWS["int4"])], device)
    assert len(step.merged) == 3
    assert step.tiles is not None
    assert step.tiles.slots == {1}


@pytest.mark.gpu
def test_long_and_short_segments_of_many_codecs_in_one_step() -> None:
    """Long ones in one launch, but for one that has int3 and one with a delta for one part; short ones; the base's."""
    shapes, gpu = [(256, 512), (128, 512)], torch.device("cuda")
    codecs = [("int2", "int2"), ("int3", "int4"), ("int4", "int2"), ("int2", None), ("int4", "int4")]
    ops = TritonOps(gpu, torch.bfloat16)
    stack, writes = ops.stack(shapes, len(codecs)), Writes()
    base = torch.randn(384, 512, dtype=torch.float64, device=gpu).mul_(0.02).bfloat16()
    weights = {-1: base.double()}
    for slot, names in enumerate(codecs):
        coded = [name and random_coded(name, shape, slot) for name, shape in zip(names, shapes, strict=True)]
        for part, one in enumerate(coded):
            stack.put(slot, part, on_device(one.delta(), gpu) if one else None, writes)
        dense = [one.dense() if one else torch.zeros(shape) for one, shape in zip(coded, shapes, strict=True)]
        weights[slot] = base.double() + torch.cat(dense).to(gpu)
    writes.send()
    runs = [(-1, 7), (0, 300), (1, 400), (2, 900), (3, 390), (4, 20)]
    x = torch.randn(sum(rows for _, rows in runs), 512, device=gpu).bfloat16()
    y = ops.linear(base, Activations(x), stack, ops.rows(runs, gpu))
    for (slot, _), got, given in zip(runs, y.split([n for _, n in runs]), x.split([n for _, n in runs]), strict=True):
        want = given.double() @ weights[slot].T
        assert float((got - want).norm() / want.norm()) < 0.02  # of short ones' int8
