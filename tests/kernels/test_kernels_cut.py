"""Where top-k and top-p cut, against sorting: the very same weight, ties and zeros included."""

import math

import pytest
import torch

from deltazip_kernels.cut import least_kept
from deltazip_ray.engine.sampling.weights import cut_sorted, whole_weights

ROWS = [(math.inf, 0.9), (math.inf, 1e-9), (5, 0.6), (200, 1.0), (10_000, 0.99)]


def columns(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    k, p = torch.tensor(ROWS, dtype=torch.float64, device=device).T
    return k[:, None].contiguous(), p[:, None].contiguous()


def compare(logits: torch.Tensor, device: torch.device) -> None:
    weights = whole_weights(logits.clone(), logits.max(-1, keepdim=True).values, torch.ones(len(logits), 1))
    top_k, top_p = columns(torch.device("cpu"))
    expected = cut_sorted(weights, top_k, top_p)
    found = least_kept(weights.to(device), *columns(device)).cpu()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("vocab", "spread"), [(1, 1.0), (300, 0.1), (5000, 3.0), (300, 40.0)])
def test_the_cut_is_that_of_sorting(vocab: int, spread: float, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(vocab)
    compare(torch.randn((len(ROWS), vocab), generator=generator) * spread, device)


@pytest.mark.parametrize("levels", [1, 9])
def test_ties_stay_or_go_together(levels: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(levels)
    compare(torch.randint(0, levels, (len(ROWS), 600), generator=generator).float(), device)


def test_a_row_that_is_not_finite_ends_and_leaves_the_others_alone(device: torch.device) -> None:
    weights = torch.full((len(ROWS), 40), 2.0**34)
    weights[3] = torch.nan
    found = least_kept(weights.to(device), *columns(device)).cpu()
    assert (found[torch.arange(len(ROWS)) != 3] == 2.0**34).all()
