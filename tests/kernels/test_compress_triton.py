"""The compressor's Triton kernels against their torch bodies, and the solver over them."""

import pytest
import torch
from torch import Tensor

from deltazip_kernels.layout import CODECS, Codec
from deltazip_ray.compress import grid, triton_grid
from deltazip_ray.compress.grid import Coded
from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.solver import Solver

SOLVED = ["int4", "int1", "sparse24_int2"]
EVERY = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
DENSE = [codec for codec in CODECS.values() if not codec.sparse]
EVERY_DENSE = pytest.mark.parametrize("codec", DENSE, ids=[codec.name for codec in DENSE])


def random_delta(rows: int, columns: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    delta = 0.02 * torch.randn(rows, columns, generator=generator)
    delta[rows // 2] = 0
    return delta.to(device)


def damped(columns: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    hessian = Hessian(columns, device)
    hessian.add((torch.randn(3 * columns, columns, generator=generator) @ mixing).to(device))
    return hessian.damp(0.01).double()


def same_rows(ours: Coded, reference: Coded, codec: Codec) -> int:
    """Rows that stand for the same, to the bit: of equal columns either may be kept."""
    pairs = [coded.dequantized(codec) if codec.sparse else coded.codes for coded in (ours, reference)]
    return int(((pairs[0] == pairs[1]).all(1) & (ours.scales == reference.scales).all(1)).sum())


@EVERY
@pytest.mark.parametrize("shape", [(18, 130), (1, 5)], ids=str)
def test_rounding_equals_the_torch_body(codec: Codec, shape: tuple[int, int], device: torch.device) -> None:
    delta = random_delta(*shape, device)
    weights = 0.1 + torch.rand(shape[1], generator=torch.Generator().manual_seed(0)).to(device)
    ours, reference = (module.round_to_nearest(delta, weights, codec) for module in (triton_grid, grid))
    # A scale that ties in one order of summation may lose in another.
    assert same_rows(ours, reference, codec) >= 0.9 * shape[0]
    errors = [(weights * (delta - coded.dequantized(codec)).square()).sum(1) for coded in (ours, reference)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=1e-12)


@EVERY
@pytest.mark.parametrize("shape", [(18, 128), (7, 70)], ids=str)
def test_a_group_equals_the_torch_body(codec: Codec, shape: tuple[int, int], device: torch.device) -> None:
    factor = torch.linalg.cholesky(damped(shape[1], device).inverse(), upper=True).float()
    found = []
    for module in (triton_grid, grid):
        work = random_delta(*shape, device)
        # Slices of wider matrices, as the solver gives them.
        codes = torch.full((shape[0], shape[1] + 9), 77, dtype=torch.uint8, device=device)
        kept = torch.ones_like(codes, dtype=torch.bool) if codec.sparse else None
        mask = None if kept is None else kept[:, 4:-5]
        scales, errors = module.code_group(work, codes[:, 4:-5], mask, factor, codec)
        assert bool((codes[:, :4] == 77).all())
        assert bool((codes[:, -5:] == 77).all())
        if kept is not None and mask is not None:
            assert bool(kept[:, :4].all())
            assert bool(kept[:, -5:].all())
            assert bool((mask[:, : shape[1] // 4 * 4].unflatten(1, (-1, 4)).sum(2) == 2).all())
        found.append((Coded(codes[:, 4:-5], scales[:, None], mask), errors))
    (ours, our_errors), (reference, reference_errors) = found
    assert same_rows(ours, reference, codec) >= 0.9 * shape[0]
    close = (our_errors - reference_errors).abs().amax(1) <= 1e-4 * reference_errors.abs().amax()
    assert int(close.sum()) >= 0.9 * shape[0]


@EVERY_DENSE
@pytest.mark.parametrize("shape", [(18, 128), (7, 70)], ids=str)
def test_a_round_of_descent_equals_the_torch_body(codec: Codec, shape: tuple[int, int], device: torch.device) -> None:
    rows, columns = shape
    wide = random_delta(rows, 200, device)
    # A group of a wider matrix, as the solver gives it, whose other columns stay as they are.
    whole, group = damped(200, device).float(), slice(20, 20 + columns)
    start = grid.round_to_nearest(wide, whole.diagonal(), codec)
    found = []
    for module in (triton_grid, grid):
        coded = Coded(start.codes.clone(), start.scales.repeat(1, 2) * 1.2, None)
        values = (coded.codes.float() - codec.zero) * coded.scales[:, 1:2]
        lost = wide - values
        slopes, untouched = lost @ whole[:, group], lost.clone()
        module.improve_group(
            wide[:, group],
            lost[:, group],
            coded.codes[:, group],
            coded.scales[:, 1],
            slopes,
            whole[group, group],
            codec,
        )
        again = wide[:, group] - (coded.codes[:, group].float() - codec.zero) * coded.scales[:, 1:2]
        torch.testing.assert_close(lost[:, group], again)
        assert lost[:, : group.start].equal(untouched[:, : group.start])
        assert lost[:, group.stop :].equal(untouched[:, group.stop :])
        assert coded.scales[:, 0].equal(start.scales[:, 0] * 1.2)
        assert not coded.codes.equal(start.codes)
        found.append(Coded(coded.codes, coded.scales[:, 1:2], None))
    assert same_rows(*found, codec) >= 0.8 * rows


@pytest.mark.parametrize("codec", [CODECS[name] for name in SOLVED], ids=SOLVED)
def test_the_solver_over_the_kernels_loses_no_more_than_over_torch(codec: Codec, device: torch.device) -> None:
    delta, metric = random_delta(20, 150, device), damped(150, device)
    lost = []
    for module in (triton_grid, grid):
        error = (delta - Solver(metric, module).solve(delta, codec).dequantized(codec)).double()
        lost.append(torch.einsum("nk,kl,nl->n", error, metric, error))
    assert float(lost[0].sum()) == pytest.approx(float(lost[1].sum()), rel=0.02)
    assert int(((lost[0] - lost[1]).abs() <= 1e-3 * lost[1] + 1e-12).sum()) >= 17
