"""Coordinate descent after compensation: better by its measure, on rows that nothing can help too."""

import pytest
import torch
from torch import Tensor

from deltazip_kernels.layout import CODECS, Codec
from deltazip_ray.compress import solver
from deltazip_ray.compress.grid import Coded, round_to_nearest
from deltazip_ray.compress.hessian import Hessian, inverse_factor
from deltazip_ray.compress.solver import Solver, compensate, descend

DENSE = [codec for codec in CODECS.values() if not codec.sparse]
EVERY_DENSE = pytest.mark.parametrize("codec", DENSE, ids=[codec.name for codec in DENSE])


def correlated(columns: int, tokens: int) -> Tensor:
    """The damped Hessian of inputs that share a few directions."""
    generator = torch.Generator().manual_seed(columns)
    hessian = Hessian(columns, torch.device("cpu"))
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    hessian.add(torch.randn(tokens, columns, generator=generator) @ mixing)
    return hessian.damp(0.01).double()


def squared_errors(delta: Tensor, coded: Coded, metric: Tensor, codec: Codec) -> Tensor:
    lost = (delta - coded.dequantized(codec)).double()
    return torch.einsum("nk,kl,nl->n", lost, metric, lost)


@EVERY_DENSE
@pytest.mark.parametrize("tokens", [400, 40], ids=["full rank", "rank deficient"])
def test_no_row_gets_worse_than_rounded_nor_all_than_compensated(codec: Codec, tokens: int) -> None:
    delta = 0.02 * torch.randn(24, 200, generator=torch.Generator().manual_seed(1))
    delta[3] = 0
    metric = correlated(200, tokens)
    compensated, _ = compensate(delta.clone(), inverse_factor(metric, torch.arange(len(metric))), codec)
    rounded = round_to_nearest(delta, metric.diagonal().float(), codec)
    found = squared_errors(delta, Solver(metric).solve(delta, codec), metric, codec)
    assert bool((found <= squared_errors(delta, rounded, metric, codec) * (1 + 1e-4) + 1e-12).all())
    assert found.sum() < squared_errors(delta, compensated, metric, codec).sum()


def test_at_one_bit_descent_takes_away_most_of_what_compensation_leaves() -> None:
    delta = 0.02 * torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    metric, codec = correlated(256, 1000), CODECS["int1"]
    compensated, _ = compensate(delta.clone(), inverse_factor(metric, torch.arange(len(metric))), codec)
    before = squared_errors(delta, compensated, metric, codec).sum()
    after = squared_errors(delta, Solver(metric).solve(delta, codec), metric, codec).sum()
    assert after < 0.5 * before


def test_slopes_of_a_panel_are_those_of_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = 0.02 * torch.randn(16, 600, generator=torch.Generator().manual_seed(4))
    metric, codec = correlated(600, 2000).float(), CODECS["int2"]
    start = round_to_nearest(delta, metric.diagonal(), codec)
    found = []
    for panel in (128, 256, 1024):
        monkeypatch.setattr(solver, "PANEL", panel)
        found.append(descend(delta, start, metric, codec))
    for other in found[1:]:
        assert (other.codes == found[0].codes).float().mean() > 0.999
        torch.testing.assert_close(
            squared_errors(delta, other, metric.double(), codec),
            squared_errors(delta, found[0], metric.double(), codec),
            rtol=1e-3,
            atol=0,
        )


@EVERY_DENSE
def test_a_delta_on_the_grid_stays_as_it_is(codec: Codec) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(2**codec.bits, (8, 256), dtype=torch.uint8, generator=generator)
    coded = Coded(codes, torch.full((8, 2), 0.125), None)
    after = descend(coded.dequantized(codec), coded, correlated(256, 1000).float(), codec)
    assert after.codes.equal(codes)
    assert after.scales.equal(coded.scales)


def test_scales_can_be_stored() -> None:
    delta = torch.randn(16, 300, generator=torch.Generator().manual_seed(4))
    scales = Solver(correlated(300, 1000)).solve(delta, CODECS["int2"]).scales
    assert scales.equal(scales.bfloat16().float())
    assert bool((scales >= 0).all())
