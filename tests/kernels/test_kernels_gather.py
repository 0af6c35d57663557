"""Embedding rows of deltas: every codec, mixed in one call, against the dense delta."""

import pytest
import torch

from deltazip_kernels import CODECS, LOW_RANK, RAW
from deltazip_kernels.gather import gather_rows
from deltazip_kernels.table import DeltaTable
from tests.support.deltas import on_device, random_coded, random_low_rank, random_raw


@pytest.mark.parametrize("shape", [(150, 300), (64, 128), (70, 1200)])
def test_rows_of_every_codec(shape: tuple[int, int], device: torch.device) -> None:
    coded = [random_coded(codec, shape, seed) for seed, codec in enumerate(CODECS)]
    raw, low_rank = random_raw(shape), random_low_rank(shape, 5)
    deltas = [*(c.delta() for c in coded), raw, low_rank, None]
    dense = [c.dense() for c in coded]
    dense += [raw.tensors["values"].double(), low_rank.tensors["up"].double() @ low_rank.tensors["down"].double()]
    dense.append(torch.zeros(shape, dtype=torch.float64))
    table = DeltaTable([shape], len(deltas), device)
    for slot, delta in enumerate(deltas):
        table.set(slot, [None if delta is None else on_device(delta, device)])
    generator = torch.Generator().manual_seed(3)
    which = torch.arange(-1, len(deltas)).repeat(3) + 1
    chosen = torch.randint(0, shape[0] + 20, which.shape, generator=generator)
    before = torch.randn((len(which), shape[1]), generator=generator)
    out = before.clone().to(device)
    gather_rows(out, chosen.to(device), which.int().to(device), table, [*CODECS, RAW, LOW_RANK])
    for row, slot, token, old in zip(out.cpu(), which.tolist(), chosen.tolist(), before, strict=True):
        added = dense[slot - 1][token] if slot and token < shape[0] else torch.zeros(shape[1], dtype=torch.float64)
        torch.testing.assert_close(row.double(), old.double() + added, atol=1e-6, rtol=1e-6)
        if not added.any():
            assert torch.equal(row, old)


def test_codecs_that_are_not_named_are_left_out(device: torch.device) -> None:
    table = DeltaTable([(64, 128)], 1, device)
    table.set(0, [on_device(random_coded("int4", (64, 128)).delta(), device)])
    out = torch.zeros(1, 128, device=device)
    gather_rows(
        out,
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.ones(1, dtype=torch.int32, device=device),
        table,
        ["int2"],
    )
    assert not out.any()
