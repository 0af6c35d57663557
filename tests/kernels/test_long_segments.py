"""Which segments get a product of their own."""

import pytest
import torch

from deltazip_kernels.fused import FUSED_ALONE_ROWS, FUSED_ROWS, FusedProduct
from deltazip_kernels.merged import MERGE_ROWS
from deltazip_ray.layers.triton_ops import TritonOps
from tests.support.deltas import random_coded, random_low_rank

LIMITS = (FUSED_ALONE_ROWS, FUSED_ROWS, MERGE_ROWS)


def least(ops: TritonOps, *, alone: bool) -> int:
    """Rows of slot 0 that make a long segment."""
    others = [] if alone else [(-1, 1)]
    lengths = [rows for limit in LIMITS for rows in (limit - 1, limit)]
    return min(rows for rows in lengths if ops.rows([(0, rows), *others], ops.device).merged)


def test_how_long_is_long_depends_on_the_version_and_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedProduct, "available", True)
    ops = TritonOps(torch.device("cpu"), torch.bfloat16)
    lora, int2 = random_low_rank((64, 128), 8), random_coded("int2", (64, 128)).delta()
    ops.count(0, None, int2)
    assert (least(ops, alone=True), least(ops, alone=False)) == (FUSED_ALONE_ROWS, FUSED_ROWS)
    ops.count(0, int2, lora)
    assert (least(ops, alone=True), least(ops, alone=False)) == (MERGE_ROWS, MERGE_ROWS)
    ops.count(0, lora, None)
    assert least(ops, alone=False) == FUSED_ROWS
    for other in (TritonOps(ops.device, torch.float16), TritonOps(ops.device, torch.bfloat16, fp8=True)):
        assert least(other, alone=True) == MERGE_ROWS
