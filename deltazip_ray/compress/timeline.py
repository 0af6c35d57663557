"""The share of the total time that each stage of a compression takes, for progress."""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from deltazip_ray.compress.options import CompressOptions, Progress

DIGEST, SAMPLING, SURVEY, HEAD = 0.03, 0.25, 3.0, 0.08
"""Durations relative to coding the blocks, between those of an 8B shape on a GPU (survey 2.5) and of 20 M parameters on
a CPU (3.8). Reading calibration data takes no time."""


class Timeline(NamedTuple):
    """Fractions of the whole that are done when a stage ends."""

    digested: float
    calibrated: float
    surveyed: float
    coded: float

    @staticmethod
    def of(options: CompressOptions) -> "Timeline":
        """The stages that ``options`` need."""
        sampled = options.calibration is None and options.dataset is None
        work = (DIGEST, SAMPLING if sampled else 0.0, SURVEY if options.allocated else 0.0, 1.0, HEAD)
        return Timeline(*(done / sum(work) for done in list(accumulate(work))[:-1]))


def within(progress: Progress, what: str, start: float, end: float) -> Callable[[float], None]:
    """Progress of a stage that spans ``start`` to ``end`` of the whole."""
    # This form is exactly ``end`` at 1, where the next stage begins.
    return lambda fraction: progress(what, start * (1 - fraction) + end * fraction)
