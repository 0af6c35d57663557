"""The kernel that draws tokens, against sorting in torch: the very same tokens, ties and zeros included."""

import math

import pytest
import torch

from deltazip_kernels.pick import pick, pick_reference

KINDS = [  # temperature, top-k, top-p, min-p
    (0.0, math.inf, 1.0, 0.0),
    (1.0, math.inf, 1.0, 0.0),
    (1e-30, math.inf, 1.0, 0.0),
    (0.7, math.inf, 0.9, 0.0),
    (1.0, math.inf, 1e-9, 0.0),
    (1.0, 5, 0.6, 0.0),
    (2.0, 200, 1.0, 0.0),
    (1.0, 10_000, 0.99, 0.02),
]
POINTS = (0.0, 0.3, 0.6, 1 - 2.0**-48, 0.99, 0.2, 0.999, 0.97)


def numbers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A row for every kind of draw."""
    kinds = torch.tensor(KINDS, dtype=torch.float64, device=device)
    return kinds.T.contiguous(), torch.tensor(POINTS, dtype=torch.float64, device=device)


def compare(logits: torch.Tensor, device: torch.device) -> None:
    """``logits`` [vocab], drawn in every way."""
    rows = logits.expand(len(KINDS), -1)
    expected = pick_reference(rows, *numbers(torch.device("cpu")))
    assert torch.equal(pick(rows.to(device), *numbers(device)).cpu(), expected)
    assert torch.equal(pick(rows[:1].to(device)).cpu(), expected[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "spread"), [(1, 1.0), (300, 0.1), (5000, 3.0), (300, 40.0)])
def test_the_tokens_are_those_of_sorting(vocab: int, spread: float, dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    compare(logits.to(dtype), device)


@pytest.mark.parametrize("levels", [1, 9])
def test_ties_stay_or_go_together(levels: int, device: torch.device) -> None:
    compare(torch.randint(0, levels, (600,), generator=torch.Generator().manual_seed(levels)).float(), device)


def test_tokens_that_cannot_be_are_never_drawn(device: torch.device) -> None:
    logits = torch.full((5000,), -torch.inf)
    logits[[7, 4103, 4999]] = torch.tensor([1.0, 2.0, 0.5])
    compare(logits, device)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_only_rows_that_are_not_finite_are_refused(broken: float, device: torch.device) -> None:
    logits = torch.randn(len(KINDS), 40, generator=torch.Generator().manual_seed(3)).to(device)
    whole = pick(logits, *numbers(device))
    logits[::3, 7] = broken
    found = pick(logits, *numbers(device))
    assert (found[::3] == -1).all()
    kept = torch.arange(len(found)) % 3 > 0
    assert torch.equal(found[kept], whole[kept])


def test_rows_may_lie_apart(device: torch.device) -> None:
    wide = torch.randn(3, 700, generator=torch.Generator().manual_seed(4)).to(device)
    assert torch.equal(pick(wide[:, :611]), pick(wide[:, :611].contiguous()))
    assert pick(wide[:0]).shape == (0,)
