"""Pure arithmetic over samples."""

import math
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from deltazip_loadgen.trace import Frozen


class Distribution(Frozen):
    """A sample in a few numbers; percentiles interpolate linearly between samples."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float = Field(description="the largest sample")


def distribution(samples: Sequence[float]) -> Distribution | None:
    """None for an empty sample; the same numbers to the last bit in whatever order the samples come."""
    if not samples:
        return None
    p50, p90, p99 = np.percentile(samples, [50, 90, 99]).tolist()
    return Distribution(
        count=len(samples),
        mean=math.fsum(samples) / len(samples),
        p50=p50,
        p90=p90,
        p99=p99,
        max=float(np.max(samples)),
    )


def jain(shares: Sequence[float]) -> float | None:
    """Jain's index of fairness: 1 when all are equal, 1/n when one has everything; None when there is nothing to share.

    (Jain, Chiu, Hawe 1984.)
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None
