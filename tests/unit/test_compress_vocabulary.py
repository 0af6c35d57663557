"""Softmaxes over pieces of a vocabulary equal those over the whole of it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deltazip_ray.compress import vocabulary
from deltazip_ray.compress.vocabulary import Divergence, logits, row_pieces, sampled_slopes

SOFTCAPS = pytest.mark.parametrize("softcap", [None, 5.0])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "ROWS", 16)
    monkeypatch.setattr(vocabulary, "TOKENS", 7)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@SOFTCAPS
@pytest.mark.parametrize("moved", [1e-5, 0.1, 30.0])
def test_divergence(moved: float, softcap: float | None) -> None:
    states, head = random(20, 12, seed=0), random(50, 12, seed=1)
    others, rebuilt = states + 0.5 * moved * random(20, 12, seed=2), head + moved * random(50, 12, seed=3)
    found = Divergence(20, states.device, softcap)
    for rows in row_pieces(50):
        found.add(states, head[rows], others, rebuilt[rows])
    ours, theirs = (logits(*pair, softcap).double().log_softmax(-1) for pair in ((states, head), (others, rebuilt)))
    expected = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    assert found.mean() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_states_that_overflow_are_not_hidden() -> None:
    states = torch.full((2, 4), torch.inf)
    found = Divergence(2, states.device)
    found.add(states, torch.ones(16, 4), states, torch.ones(16, 4))
    assert found.mean() != found.mean()


@SOFTCAPS
def test_slopes_are_those_of_tokens_drawn_from_the_softmax(softcap: float | None) -> None:
    states, head = random(4000, 3, seed=0)[:1].repeat(4000, 1), random(40, 3, seed=1)

    def pieces() -> Iterator[Tensor]:
        return (head[rows] for rows in row_pieces(len(head)))

    slopes = sampled_slopes(states, pieces, torch.Generator().manual_seed(0), softcap)
    leaf = states[:1].clone().requires_grad_()
    logs = logits(leaf, head, softcap).log_softmax(-1)
    every = torch.stack([torch.autograd.grad(log, leaf, retain_graph=True)[0][0] for log in logs[0]])
    # Each is the gradient of some token, and tokens are as frequent as they are likely.
    distances = torch.cdist(slopes.double(), every.double())
    assert float(distances.amin(1).max()) < 1e-4
    drawn = torch.bincount(distances.argmin(1), minlength=40) / len(slopes)
    likely = logs[0].detach().exp()
    assert bool(((drawn - likely).abs() < 4 * (likely / len(slopes)).sqrt() + 1e-3).all())
