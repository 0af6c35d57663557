"""The largest stages of a compression hold a bounded number of copies of what they work on."""

import pytest
import torch

from deltazip_kernels.layout import CODECS
from deltazip_ray.compress import hessian, solver, vocabulary
from deltazip_ray.compress.hessian import Hessian, inverse_factor
from deltazip_ray.compress.solver import Solver, coding_order, nearest
from deltazip_ray.compress.trials import Trials
from deltazip_ray.compress.vocabulary import Divergence, row_pieces
from tests.support.tensor_bytes import TensorBytes

COLUMNS = 256
SQUARE = 4 * COLUMNS**2
"""Bytes of a float32 matrix of as many rows as columns."""


def metric() -> torch.Tensor:
    inputs = torch.randn(2 * COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(0))
    statistics = Hessian(COLUMNS, torch.device("cpu"))
    statistics.add(inputs)
    return statistics.damp(0.01)


def test_what_is_counted() -> None:
    with TensorBytes() as counted:
        kept = torch.ones(1000)
        view, other = kept[10:], kept.reshape(10, 100).add(1)
        del other
    assert (counted.now, counted.peak) == (kept.nbytes, 2 * kept.nbytes)
    assert view.numel() == 990


def test_a_factor_takes_half_a_matrix_in_float64_and_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "PANEL", COLUMNS // 2)
    damped = metric()
    with TensorBytes() as counted:
        factor = inverse_factor(damped, coding_order(damped.diagonal()))
    packed, panel = 0.75 * SQUARE, 2 * SQUARE / 2
    assert sum(rows.nbytes for rows in factor) == packed
    assert counted.peak < 3 * packed + 3 * panel


@pytest.mark.parametrize("codec", ["int2", "sparse24_int2"])
def test_solving_takes_a_few_copies_of_a_piece(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, pieces = 64, 4
    monkeypatch.setattr(solver, "SWEEPS", 1)
    monkeypatch.setattr(solver, "PIECE", rows * COLUMNS // pieces)
    delta = 0.02 * torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(1))
    solved = Solver(metric())
    solved.solve(delta[:8], CODECS[codec])  # the factor is kept
    with TensorBytes() as counted:
        coded = solved.solve(delta, CODECS[codec])
    kept = sum(tensor.nbytes for tensor in (coded.codes, coded.scales, coded.kept) if tensor is not None)
    assert counted.peak < 2 * kept + 8 * delta.nbytes / pieces


def test_trials_hold_ten_bytes_a_weight_and_decode_one_coding_at_a_time() -> None:
    delta = 0.02 * torch.randn(512, COLUMNS, generator=torch.Generator().manual_seed(1))
    inputs, gradient = torch.randn(1, 8, COLUMNS), torch.randn(1, 8, 512)
    with TensorBytes() as counted:
        trials = Trials(delta, nearest)
    assert counted.now <= 10 * delta.numel() + 4096
    with TensorBytes() as counted:
        trials.add(inputs, gradient)
    assert counted.peak < delta.nbytes + 4 * gradient.nbytes


def test_a_divergence_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "ROWS", 128)
    monkeypatch.setattr(vocabulary, "TOKENS", 64)
    states, head = torch.randn(256, 32), torch.randn(2048, 32)
    with TensorBytes() as counted:
        found = Divergence(len(states), states.device)
        for rows in row_pieces(len(head)):
            found.add(states, head[rows], states * 1.01, head[rows])
    assert found.mean() > 0
    assert counted.peak < 12 * 8 * 64 * 128 + 10 * 8 * len(states) + 2 * states.nbytes
