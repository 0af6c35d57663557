from itertools import accumulate

import pytest
import torch

from deltazip_kernels import CODECS, PackedDelta, Segments, delta_matmul
from tests.support.deltas import random_coded, random_raw

SHAPES = [(64, 128), (100, 200), (193, 129)]
MIXTURES = {
    "distinct": ([1] * 8, [7, 6, 5, 4, 3, 2, 1, 0]),
    "zipf": ([17, 8, 5, 3, 1], [4, 3, 2, 7, 6]),
    "one giant": ([70], [1]),
    "identical": ([3, 3, 3], [2, 2, 2]),
    "empty and base between": ([0, 3, 2, 0, 5, 1], [0, -1, 1, -1, 2, 3]),
    "no rows": ([0, 0], [0, 1]),
}


def table(lengths: list[int], slots: list[int]) -> Segments:
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return Segments(starts, torch.tensor(slots, dtype=torch.int32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float64, 1e-15)],
)
def test_torch_backend_equals_float64(
    shape: tuple[int, int], mixture: str, dtype: torch.dtype, tolerance: float
) -> None:
    lengths, slots = MIXTURES[mixture]
    names = [None, *CODECS, "raw"]
    coded = [random_coded(n, shape, seed=i) if n in CODECS else None for i, n in enumerate(names)]
    raw = random_raw(shape)
    deltas: list[PackedDelta | None] = [c.delta() if c else None for c in coded]
    deltas[names.index("raw")] = raw
    rows = sum(lengths) + 3  # the last rows belong to no segment
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    wide = torch.randn(rows, shape[0] + 7, generator=generator).to(dtype)
    before = wide.clone()
    delta_matmul(wide[:, 3 : 3 + shape[0]], x, deltas, table(lengths, slots))
    touched = torch.zeros(rows, dtype=torch.bool)
    want = before.double()
    row = 0
    for length, slot in zip(lengths, slots, strict=True):
        if slot >= 0 and deltas[slot] is not None:
            code = coded[slot]
            dense = code.dense() if code else raw.tensors["values"].double()
            want[row : row + length, 3 : 3 + shape[0]] += x[row : row + length].double() @ dense.T
            touched[row : row + length] = True
        row += length
    assert torch.equal(wide[~touched], before[~touched])
    assert torch.equal(wide[:, :3], before[:, :3])
    assert torch.equal(wide[:, 3 + shape[0] :], before[:, 3 + shape[0] :])
    # One rounding of the product and one of the sum, each relative to the numbers at hand.
    assert float((wide.double() - want).abs().max()) <= 2 * tolerance * max(float(want.abs().max()), 1.0)


def test_refuses_what_does_not_fit() -> None:
    delta = random_coded("int4", (64, 128)).delta()
    segments = table([2], [0])
    x, y = torch.zeros(2, 128), torch.zeros(2, 64)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        delta_matmul(y, x, [delta], segments, backend="cuda")
    with pytest.raises(ValueError, match="does not fit a product"):
        delta_matmul(y[:, :63], x, [delta], segments)
    with pytest.raises(ValueError, match="must be"):
        delta_matmul(y[:1], x, [delta], segments)


def test_tables_and_deltas_are_checked_when_made() -> None:
    int32 = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="need one start more"):
        Segments(int32, int32)
    with pytest.raises(ValueError, match="int32"):
        Segments(int32.long(), int32[:2])
    with pytest.raises(ValueError, match="a raw delta"):
        PackedDelta("raw", (2, 3), {"values": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="packed tensors"):
        PackedDelta("int4", (2, 3), {"codes": torch.zeros(3, 2)})
