"""Arrivals and popularity follow the laws that they claim; seeds are fixed, so nothing here can flicker."""

import math
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from deltazip_loadgen import GeneratedTrace, TraceSpec
from deltazip_loadgen.arrivals import arrivals
from deltazip_loadgen.popularity import Popularity
from deltazip_loadgen.spec import Burst, Gamma, Poisson, UniformPopularity, Weights, Zipf

# Upper 0.1 % points of the chi-square law, from tables.
CHI2_999 = {7: 24.32, 19: 43.82}


def names(count: int) -> tuple[str, ...]:
    return tuple(f"m{i}" for i in range(count))


def made(spec: TraceSpec, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Times and model indices."""
    pairs = arrivals(spec, np.random.SeedSequence(seed))
    return np.array([at_s for at_s, _ in pairs]), np.array([index for _, index in pairs])


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    expected = shares / shares.sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("law", "cv"), [(Poisson(), 1.0), (Gamma(cv=0.25), 0.25), (Gamma(cv=1), 1.0), (Gamma(cv=3), 3.0)]
)
def test_gaps_have_the_mean_and_variation_that_were_asked_for(law: Poisson | Gamma, cv: float) -> None:
    count, rate = 40_000, 8.0
    times, _ = made(TraceSpec(models=("m",), rate=rate, requests=count, arrivals=law))
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / rate, rel=4 * cv / math.sqrt(count))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def test_poisson_counts_vary_as_much_as_their_mean() -> None:
    times, _ = made(TraceSpec(models=("m",), rate=5, duration_s=20_000))
    counts, _ = np.histogram(times, np.arange(0, 20_001, 10.0))
    assert counts.mean() == pytest.approx(50, rel=0.02)
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.13)


def test_duration_and_requests_end_the_trace() -> None:
    times, _ = made(TraceSpec(models=("m",), rate=5, duration_s=7))
    assert 0 < times[-1] < 7
    assert len(made(TraceSpec(models=("m",), rate=5, requests=123))[0]) == 123
    burst = Burst(on_s=1, off_s=9)
    assert len(made(TraceSpec(models=names(3), rate=5, requests=123, arrivals=burst))[0]) == 123
    assert made(TraceSpec(models=names(3), rate=5, duration_s=7, arrivals=burst))[0].max() < 7


@pytest.mark.parametrize("s", [0.5, 1.0, 1.6])
def test_zipf_is_a_power_of_the_rank(s: float) -> None:
    _, chosen = made(TraceSpec(models=names(20), rate=10, requests=30_000, popularity=Zipf(s=s)))
    counts = np.bincount(chosen, minlength=20)
    ranks = np.arange(1, 21)
    assert chi_square(counts, ranks**-s) < CHI2_999[19]
    # The usual mistakes would be found: growing with the rank, geometric, or another exponent.
    assert chi_square(counts, ranks**s) > 10 * CHI2_999[19]
    assert chi_square(counts, math.exp(-s) ** ranks) > 10 * CHI2_999[19]
    assert chi_square(counts, ranks ** -(s + 0.1)) > CHI2_999[19]


def test_uniform_and_weighted_shares() -> None:
    spec = TraceSpec(models=names(8), rate=10, requests=20_000, popularity=UniformPopularity())
    assert chi_square(np.bincount(made(spec)[1], minlength=8), np.ones(8)) < CHI2_999[7]
    values = (1.0, 5.0, 2.0, 0.5, 8.0, 1.0, 1.0, 3.0)
    spec = spec.model_copy(update={"popularity": Weights(values=values)})
    assert chi_square(np.bincount(made(spec)[1], minlength=8), np.array(values)) < CHI2_999[7]


@pytest.mark.parametrize("law", [Poisson(), Burst(on_s=0.5, off_s=0.5)])
def test_drift_permutes_the_ranks_each_period(law: Poisson | Burst) -> None:
    every_s, rate = 2000.0, 20.0
    spec = TraceSpec(
        models=names(5), rate=rate, duration_s=4 * every_s, arrivals=law, drift_every_s=every_s, popularity=Zipf(s=1.5)
    )
    times, chosen = made(spec)
    shares = np.arange(1, 6) ** -1.5
    shares /= shares.sum()
    orders = set()
    for period in range(4):
        inside = (times >= period * every_s) & (times < (period + 1) * every_s)
        observed = np.bincount(chosen[inside], minlength=5) / (rate * every_s)
        assert np.sort(observed)[::-1] == pytest.approx(shares, abs=0.035), "the same shares, of other models"
        orders.add(tuple(np.argsort(-observed).tolist()))
        if period == 0:
            assert np.argmax(observed) == 0, "the first period has the ranks as given"
    assert len(orders) >= 3


def test_periods_of_drift_can_be_asked_for_in_any_order() -> None:
    spec = TraceSpec(models=names(9), rate=1, requests=1, drift_every_s=10)
    popularity = Popularity(spec, np.random.SeedSequence(5))
    forward = [popularity.shares(period) for period in range(6)]
    backward = [popularity.shares(period) for period in reversed(range(6))][::-1]
    assert all((a == b).all() for a, b in zip(forward, backward, strict=True))


def test_bursts_keep_the_mean_rate_and_the_shares() -> None:
    spec = TraceSpec(models=names(4), rate=8, duration_s=40_000, arrivals=Burst(on_s=2, off_s=8), popularity=Zipf(s=1))
    times, chosen = made(spec)
    assert len(times) / 40_000 == pytest.approx(8, rel=0.03)
    shares = np.bincount(chosen) / len(chosen)
    assert shares == pytest.approx(np.array([12, 6, 4, 3]) / 25, rel=0.06)
    assert (np.diff(times) >= 0).all()


def test_bursts_are_as_bursty_as_an_interrupted_poisson_process() -> None:
    """Its index of dispersion tends to 1 + 2 λ_on r_on→off / (r_on→off + r_off→on)² over long windows.

    (Fischer and Meier-Hellstern, "The Markov-modulated Poisson process cookbook", 1993.)
    """
    on_s, off_s, rate = 2.0, 8.0, 3.0
    spec = TraceSpec(models=("m",), rate=rate, duration_s=400_000, arrivals=Burst(on_s=on_s, off_s=off_s))
    times, _ = made(spec)
    counts, _ = np.histogram(times, np.arange(0, 400_001, 200.0))
    leave, enter = 1 / on_s, 1 / off_s
    while_on = rate * (on_s + off_s) / on_s
    theory = 1 + 2 * while_on * leave / (leave + enter) ** 2
    assert theory == pytest.approx(39.4)
    # The window is 125 correlation times long, which takes 0.8 % off the limit.
    assert counts.var() / counts.mean() == pytest.approx(theory, rel=0.12)


def test_bursts_of_different_models_are_independent() -> None:
    spec = TraceSpec(
        models=names(2), rate=6, duration_s=40_000, arrivals=Burst(on_s=2, off_s=8), popularity=UniformPopularity()
    )
    times, chosen = made(spec)
    edges = np.arange(0, 40_001, 10.0)
    first, second = (np.histogram(times[chosen == model], edges)[0] for model in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(edges))


def test_bursts_start_in_their_steady_state() -> None:
    """Over many models, the first second is as busy as any other."""
    spec = TraceSpec(
        models=names(3000), rate=3000, duration_s=3, arrivals=Burst(on_s=2, off_s=8), popularity=UniformPopularity()
    )
    counts, _ = np.histogram(made(spec)[0], [0, 1, 2, 3])
    assert counts == pytest.approx([3000, 3000, 3000], rel=0.12)


def test_one_parameter_leaves_the_rest_of_the_trace_as_it_was() -> None:
    spec = TraceSpec(models=names(3), rate=5, requests=50)
    shorter = spec.model_copy(update={"max_tokens": spec.max_tokens.model_copy(update={"high": 20})})
    skewed = spec.model_copy(update={"popularity": Zipf(s=2)})
    plain, other, third = (list(GeneratedTrace(each, 4)) for each in (spec, shorter, skewed))
    assert [(r.at_s, r.model, r.messages) for r in plain] == [(r.at_s, r.model, r.messages) for r in other]
    assert [(r.at_s, r.messages, r.max_tokens) for r in plain] == [(r.at_s, r.messages, r.max_tokens) for r in third]
    assert all(earlier.at_s <= later.at_s for earlier, later in pairwise(plain))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"requests": 1, "duration_s": 1}, "not both"),
        ({}, "how long"),
        ({"requests": 1, "models": ("a", "a")}, "named twice"),
        ({"requests": 1, "models": ()}, "models"),
        ({"requests": 1, "rate": 0}, "rate"),
        ({"requests": 1, "popularity": Weights(values=(1, 2))}, "2 weights for 3 models"),
        ({"requests": 1, "arrivals": {"kind": "gamma", "cv": 0}}, "cv"),
    ],
)
def test_contradicting_settings_are_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TraceSpec.model_validate({"models": names(3), "rate": 1.0} | fields)
