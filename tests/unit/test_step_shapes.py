"""What the start records serves every mixture of named codecs: no step waits for a recording."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from deltazip_ray.engine.step_shapes import StepShape, mixtures, numbers_of_versions, step_sizes


@pytest.mark.parametrize("slots", [1, 3, 8, 32])
def test_the_steps_of_the_warm_up_take_every_recording_that_a_mixture_can_take(slots: int) -> None:
    rng = random.Random(slots)
    sizes = step_sizes(256)

    def taken(rows: int, lengths: Sequence[int]) -> StepShape:
        return StepShape.of(next(size for size in sizes if size >= rows), lengths, slots, arriving=False)

    recorded = {
        taken(rows, lengths)
        for rows in sizes
        for versions in numbers_of_versions(min(rows, slots))
        for lengths in mixtures(rows, versions)
    }
    for _ in range(2000):
        rows, skew = rng.randint(1, 256), rng.choice((0, 1, 4))
        weights = [rng.random() ** skew for _ in range(slots + 1)]
        drawn = Counter(rng.choices(range(slots + 1), weights, k=rows))
        lengths = [count for slot, count in drawn.items() if slot < slots]
        assert not lengths or taken(rows, lengths) in recorded
