"""The solver against a dense reference, and on the inputs that break solvers."""

import pytest
import torch
from torch import Tensor

from deltazip_kernels.layout import CODECS, GROUP, Codec, pack, unpack
from deltazip_ray.compress import hessian
from deltazip_ray.compress.grid import Coded, choose_scales, round_to_nearest, to_codes
from deltazip_ray.compress.hessian import Hessian, inverse_factor
from deltazip_ray.compress.solver import Solver, coding_order, compensate
from deltazip_ray.errors import CompressionError

EVERY_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
DENSE = pytest.mark.parametrize("codec", [c for c in CODECS.values() if not c.sparse], ids=lambda codec: codec.name)
DAMPING = 0.01


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    return torch.randn(tokens, columns, generator=generator) @ mixing


def hessian_of(inputs: Tensor) -> Hessian:
    hessian = Hessian(inputs.shape[1], torch.device("cpu"))
    hessian.add(inputs)
    return hessian


def random_delta(rows: int, columns: int, seed: int = 1) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def errors(delta: Tensor, coded: Coded, codec: Codec, metric: Tensor) -> Tensor:
    """Squared error of each row in the norm of ``metric``, in float64."""
    error = (delta - coded.dequantized(codec)).double()
    return torch.einsum("nk,kl,nl->n", error, metric, error)


def check_on_grid(coded: Coded, codec: Codec, delta: Tensor) -> None:
    """Codes, scales and masks are ones that the layout can hold, and it gives back what we think they mean."""
    assert coded.codes.dtype == torch.uint8
    assert int(coded.codes.max()) < 2**codec.bits
    assert torch.equal(coded.scales, coded.scales.bfloat16().float())
    assert (coded.kept is not None) == codec.sparse
    if coded.kept is not None:
        counts = torch.nn.functional.pad(coded.kept, (0, -delta.shape[1] % 4)).unflatten(1, (-1, 4)).sum(-1)
        assert int(counts[:, : delta.shape[1] // 4].min()) == int(counts.max()) == 2
    packed = pack(codec.name, coded.codes, coded.scales, coded.kept)
    shape = (delta.shape[0], delta.shape[1])
    torch.testing.assert_close(unpack(codec.name, packed, shape), coded.dequantized(codec), rtol=0, atol=0)


def eliminated(delta: Tensor, damped: Tensor, codec: Codec) -> Tensor:
    """Compensation as the papers derive it: after each column, the optimal update of the columns still open, with an
    inverse of the remaining Hessian computed afresh. float64, column by column, no factorization shared."""
    work, columns = delta.double(), delta.shape[1]
    result = torch.zeros_like(work)
    inverses = [damped[j:, j:].inverse() for j in range(columns)]
    cost = torch.stack([1 / inverse[0, 0] for inverse in inverses])
    for j in range(columns):
        if j % GROUP == 0:
            group = slice(j, min(j + GROUP, columns))
            values = work[:, group].float()
            if codec.sparse:
                top = (values.square() * cost[group]).unflatten(1, (-1, 4)).topk(2, 2).indices
                mask = torch.zeros_like(values, dtype=torch.bool).unflatten(1, (-1, 4)).scatter_(2, top, True)
                scales = choose_scales(values, cost[group].float() * mask.flatten(1), codec)
            else:
                scales = choose_scales(values, cost[group].float(), codec)
        if codec.sparse and j % 4 == 0:
            top = (work[:, j : j + 4].square() * cost[j : j + 4]).topk(2, 1).indices
            keep = torch.zeros(work.shape[0], 4, dtype=torch.bool).scatter_(1, top, True)
        value = (to_codes(work[:, j].float(), scales, codec) - codec.zero) * scales
        result[:, j] = value * keep[:, j % 4] if codec.sparse else value
        error = work[:, j] - result[:, j]
        inverse = inverses[j]
        work[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return result


@EVERY_CODEC
def test_compensation_equals_the_elimination_of_the_papers(codec: Codec) -> None:
    delta, damped = random_delta(6, 136), hessian_of(correlated(400, 136)).damp(DAMPING).double()
    fast, squared = compensate(delta.clone(), inverse_factor(damped, torch.arange(136)), codec)
    reference = eliminated(delta, damped, codec)
    # float32 against float64 may tip a value that lies between two codes; then the rest of that row differs.
    agreeing = (fast.dequantized(codec) - reference).abs().amax(1) < 1e-6
    assert int(agreeing.sum()) >= 5
    torch.testing.assert_close(squared.double(), errors(delta, fast, codec, damped), rtol=1e-3, atol=0)


@pytest.mark.parametrize("columns", [5, 128, 256, 300, 640])
def test_the_factor_in_panels_is_that_of_the_inverse(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "PANEL", 2 * GROUP)
    damped = hessian_of(correlated(columns // 2 + 1, columns)).damp(DAMPING).double()
    order = coding_order(damped.diagonal())
    upper = torch.zeros_like(damped)
    for start, rows in zip(range(0, columns, GROUP), inverse_factor(damped, order), strict=True):
        upper[start : start + len(rows), start:] = rows
    assert upper.equal(upper.triu())
    reference = torch.linalg.cholesky(damped[order[:, None], order].inverse(), upper=True)
    torch.testing.assert_close(upper, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


def test_an_indefinite_matrix_is_raised_until_it_has_a_factor() -> None:
    matrix = torch.ones(200, 200)
    matrix.diagonal().sub_(1e-4)
    factor = inverse_factor(matrix, torch.arange(200))
    assert all(bool(rows.isfinite().all()) for rows in factor)


@EVERY_CODEC
@pytest.mark.parametrize("shape", [(5, 128), (70, 256), (33, 96), (8, 130), (1, 5)], ids=str)
def test_no_row_is_worse_than_rounding_to_nearest(codec: Codec, shape: tuple[int, int]) -> None:
    delta, damped = random_delta(*shape), hessian_of(correlated(64, shape[1])).damp(DAMPING).double()
    solved = Solver(damped).solve(delta, codec)
    nearest = round_to_nearest(delta, damped.diagonal().float(), codec)
    check_on_grid(solved, codec, delta)
    assert bool((errors(delta, solved, codec, damped) <= errors(delta, nearest, codec, damped) * (1 + 1e-4)).all())


@EVERY_CODEC
def test_compensation_lowers_the_output_error_of_correlated_inputs(codec: Codec) -> None:
    delta, inputs = random_delta(64, 256), correlated(2048, 256)
    damped = hessian_of(inputs).damp(DAMPING).double()
    solved = Solver(damped).solve(delta, codec).dequantized(codec)
    nearest = round_to_nearest(delta, damped.diagonal().float(), codec).dequantized(codec)
    assert (inputs @ (delta - solved).T).norm() < 0.75 * (inputs @ (delta - nearest).T).norm()


@EVERY_CODEC
def test_a_delta_on_the_grid_is_kept_exactly(codec: Codec) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 2**codec.bits, (40, 256), generator=generator)
    codes[:, ::GROUP] = 0
    scales = (0.001 + 0.02 * torch.rand(40, 2, generator=generator)).bfloat16().float()
    delta = (codes - codec.zero) * scales.repeat_interleave(GROUP, 1)
    if codec.sparse:
        delta = delta.unflatten(1, (-1, 4)).clone()
        delta[..., 1::2] = 0
        delta = delta.flatten(1)
    solved = Solver(hessian_of(correlated(600, 256)).damp(DAMPING).double()).solve(delta, codec)
    assert torch.equal(solved.dequantized(codec), delta)


@EVERY_CODEC
def test_few_tokens_leave_a_rank_deficient_hessian(codec: Codec) -> None:
    delta, damped = random_delta(16, 128), hessian_of(correlated(3, 128)).damp(DAMPING).double()
    solved = Solver(damped).solve(delta, codec)
    check_on_grid(solved, codec, delta)
    # Directions that no token spans must not be used as a dump for errors.
    assert (delta - solved.dequantized(codec)).norm() < 1.5 * delta.norm()


@EVERY_CODEC
def test_without_tokens_no_row_is_worse_than_rounded_to_nearest(codec: Codec) -> None:
    delta, damped = random_delta(16, 128), Hessian(128, torch.device("cpu")).damp(DAMPING).double()
    solved = Solver(damped).solve(delta, codec).dequantized(codec)
    nearest = round_to_nearest(delta, torch.ones(128), codec).dequantized(codec)
    assert bool(((delta - solved).norm(dim=1) <= (delta - nearest).norm(dim=1) * (1 + 1e-6)).all())


@pytest.mark.parametrize("codec", [CODECS["int4"], CODECS["int2"]], ids=["int4", "int2"])
def test_dead_columns_are_rounded_and_disturb_nobody(codec: Codec) -> None:
    inputs = correlated(512, 128)
    inputs[:, 10:30] = 0
    delta = random_delta(16, 128)
    solved = Solver(hessian_of(inputs).damp(DAMPING).double()).solve(delta, codec)
    check_on_grid(solved, codec, delta)
    step = solved.scales.amax(1, keepdim=True)
    dead = slice(10, 30)
    inside = delta[:, dead].abs() < (codec.zero - 0.5) * step
    error = (solved.dequantized(codec) - delta)[:, dead].abs()
    assert bool((error <= 0.5 * step + 1e-6)[inside].all())


@EVERY_CODEC
def test_an_ill_conditioned_hessian(codec: Codec) -> None:
    inputs = torch.randn(256, 1, generator=torch.Generator().manual_seed(0)) * torch.logspace(4, -6, 128)
    delta, damped = random_delta(16, 128), hessian_of(inputs).damp(1e-6).double()
    solved = Solver(damped).solve(delta, codec)
    check_on_grid(solved, codec, delta)
    nearest = round_to_nearest(delta, damped.diagonal().float(), codec)
    assert bool((errors(delta, solved, codec, damped) <= errors(delta, nearest, codec, damped) * (1 + 1e-4)).all())


@EVERY_CODEC
@pytest.mark.parametrize("value", [0.0, 0.01, -3.0, 1e-30, 1e30])
def test_constant_rows(codec: Codec, value: float) -> None:
    delta = random_delta(4, 128)
    delta[2] = value
    solved = Solver(hessian_of(correlated(300, 128)).damp(DAMPING).double()).solve(delta, codec)
    check_on_grid(solved, codec, delta)
    rebuilt = solved.dequantized(codec)[2]
    assert bool(rebuilt.isfinite().all())
    if value == 0.0:
        assert not rebuilt.any()


def test_scales_of_a_group_beat_the_largest_magnitude() -> None:
    codec = CODECS["int2"]
    values, weights = random_delta(200, GROUP), torch.rand(GROUP, generator=torch.Generator().manual_seed(2)) + 0.1
    scales = choose_scales(values, weights, codec)[:, None]
    plain = (values.abs().amax(1, keepdim=True) / codec.zero).bfloat16().float()

    def error(scale: Tensor) -> float:
        return float((weights * (values - (to_codes(values, scale, codec) - codec.zero) * scale).square()).sum())

    assert error(scales) < 0.5 * error(plain)


@EVERY_CODEC
def test_rows_do_not_depend_on_each_other(codec: Codec) -> None:
    delta, damped = random_delta(24, 192), hessian_of(correlated(500, 192)).damp(DAMPING).double()
    together = Solver(damped).solve(delta, codec).dequantized(codec)
    apart = torch.cat([Solver(damped).solve(part, codec).dequantized(codec) for part in delta.split(8)])
    assert float(((together - apart).abs().amax(1) > 0).float().mean()) < 0.1


def test_inputs_that_overflow_are_refused() -> None:
    hessian = Hessian(4, torch.device("cpu"))
    hessian.add(torch.full((2, 4), 1e30))
    with pytest.raises(CompressionError, match=r"mlp\.down_proj overflow"):
        hessian.check("mlp.down_proj")


@pytest.mark.parametrize("columns", [512, 130, 7, 300])
def test_columns_are_coded_by_energy_and_groups_stay_together(columns: int) -> None:
    energy = torch.rand(columns, generator=torch.Generator().manual_seed(columns))
    energy[columns // 2 :] = 0.5  # ties
    order = coding_order(energy)
    assert torch.equal(order.sort().values, torch.arange(columns))
    groups = order.split(GROUP)
    for group in groups:
        assert len(set((group // GROUP).tolist())) == 1
        assert energy[group].tolist() == sorted(energy[group].tolist(), reverse=True)
    assert columns % GROUP == 0 or int(groups[-1][0]) // GROUP == len(groups) - 1
    sums = [float(energy[group].sum()) for group in groups if len(group) == GROUP]
    assert sums == pytest.approx(sorted(sums, reverse=True))


@DENSE
def test_energy_first_loses_less_than_left_to_right(codec: Codec) -> None:
    inputs = correlated(1024, 384) * torch.linspace(0.2, 2, 384)
    delta, damped = random_delta(32, 384), hessian_of(inputs).damp(DAMPING).double()
    left_to_right, _ = compensate(delta.clone(), inverse_factor(damped, torch.arange(384)), codec)
    solved = Solver(damped).solve(delta, codec)
    lost = [float(errors(delta, coded, codec, damped).sum()) for coded in (solved, left_to_right)]
    assert lost[0] < 0.95 * lost[1]
