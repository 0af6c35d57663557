"""Records over time, binned for plots."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deltazip_loadgen.record import Record

Array = npt.NDArray[np.float64]

BIN_CHOICES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
BINS = 80


def bin_edges(records: Sequence[Record]) -> Array:
    """Edges of equal bins of a round width from 0 to the last end, at most about 80 of them; [bins + 1]."""
    end_s = max(record.end_s for record in records)
    width_s = next((width for width in BIN_CHOICES_S if end_s / width <= BINS), end_s / BINS)
    return np.asarray(np.arange(0, int(end_s // width_s) + 2) * width_s, dtype=np.float64)


def rate(times_s: Sequence[float], edges: Array, weights: Sequence[float] | None = None) -> Array:
    """Events (or their weights) a second in each bin; [bins]."""
    counts, _ = np.histogram(times_s, edges, weights=weights)
    return np.asarray(counts / np.diff(edges), dtype=np.float64)


def under_way(records: Sequence[Record], edges: Array) -> Array:
    """Mean number of requests between their intended start and their end in each bin; [bins]."""
    starts = np.array([record.intended_s for record in records])
    lasted = np.array([record.end_s for record in records]) - starts
    spent_s = np.array([np.clip(edge - starts, 0, lasted).sum() for edge in edges])
    return np.asarray(np.diff(spent_s) / np.diff(edges), dtype=np.float64)


def token_rate(records: Sequence[Record], edges: Array) -> Array:
    """Output tokens a second in each bin; an answer's tokens are spread evenly over its groups; [bins]."""
    times, weights = [], []
    for record in records:
        for at_s in record.arrivals_s:
            times.append(at_s)
            weights.append((record.output_tokens or 0) / len(record.arrivals_s))
    return rate(times, edges, weights)
