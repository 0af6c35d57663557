"""When requests start and whom they ask: endless, ordered streams of (seconds, model index)."""

import heapq
import math
from collections.abc import Iterator
from itertools import islice, takewhile

import numpy as np

from deltazip_loadgen.popularity import Popularity
from deltazip_loadgen.spec import Burst, Gamma, TraceSpec

Arrival = tuple[float, int]

BLOCK = 1024


def arrivals(spec: TraceSpec, seed: np.random.SeedSequence) -> list[Arrival]:
    """All arrivals of a trace, in order of time."""
    popularity_seed, choice_seed, time_seed = seed.spawn(3)
    popularity = Popularity(spec, popularity_seed)
    if isinstance(spec.arrivals, Burst):
        stream = _bursts(spec, spec.arrivals, popularity, time_seed)
    else:
        gap_cv = spec.arrivals.cv if isinstance(spec.arrivals, Gamma) else 1.0
        times = _renewal(np.random.default_rng(time_seed), spec.rate, gap_cv)
        stream = _assign(times, popularity, np.random.default_rng(choice_seed))
    end_s = math.inf if spec.duration_s is None else spec.duration_s
    return list(islice(takewhile(lambda arrival: arrival[0] < end_s, stream), spec.requests))


def _renewal(rng: np.random.Generator, rate: float, cv: float) -> Iterator[float]:
    """Times with independent Gamma gaps of mean 1 / ``rate`` and coefficient of variation ``cv``."""
    shape, scale = cv**-2, cv**2 / rate
    at_s = 0.0
    while True:
        for gap in rng.gamma(shape, scale, BLOCK).tolist():
            at_s += gap
            yield at_s


def _assign(times: Iterator[float], popularity: Popularity, rng: np.random.Generator) -> Iterator[Arrival]:
    """Give every time a model, drawn by the shares of its period."""
    for at_s in times:
        edges = np.cumsum(popularity.shares(popularity.period(at_s)))
        # The last edge may be a rounding error below one, and a draw may lie above it.
        yield at_s, min(int(np.searchsorted(edges, rng.random(), side="right")), len(edges) - 1)


def _bursts(spec: TraceSpec, law: Burst, popularity: Popularity, seed: np.random.SeedSequence) -> Iterator[Arrival]:
    """All models' on/off streams, merged."""
    streams = (
        _burst(index, spec, law, popularity, np.random.default_rng(state))
        for index, state in enumerate(seed.spawn(len(spec.models)))
    )
    return heapq.merge(*streams)


def _burst(
    index: int, spec: TraceSpec, law: Burst, popularity: Popularity, rng: np.random.Generator
) -> Iterator[Arrival]:
    """One model's stream: Poisson inside its bursts, silent between them."""
    faster = (law.on_s + law.off_s) / law.on_s
    for start_s, end_s, period in _on_times(law, spec.drift_every_s or math.inf, rng):
        share = float(popularity.shares(period)[index])
        count = rng.poisson(spec.rate * share * faster * (end_s - start_s))
        for at_s in np.sort(rng.uniform(start_s, end_s, count)).tolist():
            yield at_s, index


def _on_times(law: Burst, cut_every_s: float, rng: np.random.Generator) -> Iterator[tuple[float, float, int]]:
    """Bursts as (start, end, drift period), cut where a period ends so that each piece has one rate.

    Exponential times have no memory, so starting "on" with probability on / (on + off) is the steady state.
    """
    at_s = 0.0 if rng.random() < law.on_s / (law.on_s + law.off_s) else rng.exponential(law.off_s)
    while True:
        end_s = at_s + rng.exponential(law.on_s)
        period = int(at_s // cut_every_s)
        while (cut_s := (period + 1) * cut_every_s) < end_s:
            yield at_s, cut_s, period
            at_s, period = cut_s, period + 1
        yield at_s, end_s, period
        at_s = end_s + rng.exponential(law.off_s)
