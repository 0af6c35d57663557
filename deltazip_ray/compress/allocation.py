"""Chooses a codec for each matrix, so that all fit a budget of bytes at the least loss of quality.

Each matrix has a few choices of (bytes, cost), and costs add up. Starting from the smallest choice of every matrix, the
algorithm walks their lower convex hulls, always taking the step that saves the most cost per byte. This greedy walk is
the Lagrangian solution of Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers" (IEEE Trans.
ASSP 36(9), 1988): for budgets that are used up exactly by a step, no other allocation is better.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltazip_ray.compress.options import Coding
from deltazip_ray.errors import CompressionError


@dataclass(frozen=True)
class Choice:
    """One way to code a matrix: its stored bytes, and its cost in any unit that adds up over matrices."""

    coding: Coding
    size: int
    cost: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice for each matrix, in total at most ``budget`` bytes.

    Raises CompressionError when even the smallest choices take more.
    """
    hulls = {name: hull(options) for name, options in choices.items()}
    chosen = {name: steps[0] for name, steps in hulls.items()}
    room = budget - sum(choice.size for choice in chosen.values())
    if room < 0:
        raise CompressionError(
            f"the smallest artifact is {-room} bytes larger than the target: ask for more bits or a lower ratio"
        )
    # (negative gain per byte, matrix, step on its hull): ties are broken by name, so that the result is deterministic.
    ahead = [(-_gain(*steps[:2]), name, 1) for name, steps in hulls.items() if len(steps) > 1]
    heapq.heapify(ahead)
    while ahead:
        _, name, step = heapq.heappop(ahead)
        steps = hulls[name]
        price = steps[step].size - chosen[name].size
        if price > room:
            continue  # a smaller step of another matrix may still fit
        chosen[name] = steps[step]
        room -= price
        if step + 1 < len(steps):
            heapq.heappush(ahead, (-_gain(*steps[step : step + 2]), name, step + 1))
    return chosen


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull, by size: each step gains less per byte than the one before."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.size, choice.cost)):
        if found and choice.cost >= found[-1].cost:
            continue
        while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-1], choice):
            found.pop()
        found.append(choice)
    return found


def _gain(smaller: Choice, larger: Choice) -> float:
    """Cost saved per additional byte."""
    return (smaller.cost - larger.cost) / (larger.size - smaller.size)
