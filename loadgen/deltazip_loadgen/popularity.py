"""Which model gets which share of the requests, and how that drifts."""

import numpy as np
import numpy.typing as npt

from deltazip_loadgen.spec import TraceSpec, Weights, Zipf

Shares = npt.NDArray[np.float64]


def rank_shares(spec: TraceSpec) -> Shares:
    """Share of every rank, the first rank first; [models], sums to one."""
    ranks = np.arange(1, len(spec.models) + 1, dtype=np.float64)
    match spec.popularity:
        case Zipf(s=s):
            weights = ranks**-s
        case Weights(values=values):
            weights = np.asarray(values, dtype=np.float64)
        case _:
            weights = np.ones_like(ranks)
    return np.asarray(weights / weights.sum())


class Popularity:
    """Shares of the models over time.

    Time is cut into periods of ``drift_every_s``. In period 0 the ranks are as given; every later period has
    a permutation of its own, drawn from (seed, period), so that any period can be asked for in any order.
    """

    def __init__(self, spec: TraceSpec, seed: np.random.SeedSequence) -> None:
        self._ranked = rank_shares(spec)
        self._every_s = spec.drift_every_s
        self._seed = seed
        self._period = 0
        self._shares = self._ranked

    def period(self, at_s: float) -> int:
        """The period that ``at_s`` lies in."""
        return 0 if self._every_s is None else int(at_s // self._every_s)

    def shares(self, period: int) -> Shares:
        """Share of every model, in the order of ``spec.models``; [models], sums to one."""
        if period != self._period:
            self._period, self._shares = period, self._permuted(period)
        return self._shares

    def _permuted(self, period: int) -> Shares:
        if period == 0:
            return self._ranked
        state = np.random.SeedSequence(entropy=self._seed.entropy, spawn_key=(*self._seed.spawn_key, period))
        shares = np.empty_like(self._ranked)
        shares[np.random.default_rng(state).permutation(len(shares))] = self._ranked
        return shares
