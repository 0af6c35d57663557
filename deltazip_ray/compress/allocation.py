"""Which codec for which matrix, so that all together fit a budget of bytes and cost the least quality.

Each matrix has a few choices of (bytes, cost), and costs add up. The lower convex hull of a matrix's choices is walked
from its smallest; of all next steps the one that takes away most cost a byte goes first. This greedy walk is the
Lagrangian solution of Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers" (IEEE Trans.
ASSP 36(9), 1988): at the budgets where it stops after a whole step no other choice is better.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltazip_ray.compress.options import Coding
from deltazip_ray.errors import CompressionError


@dataclass(frozen=True)
class Choice:
    """One way to code a matrix: its bytes as stored, and what it costs (any unit that adds up over matrices)."""

    coding: Coding
    size: int
    cost: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice for each matrix, together at most ``budget`` bytes.

    Raises CompressionError when the smallest choices together are larger.
    """
    hulls = {name: hull(options) for name, options in choices.items()}
    chosen = {name: steps[0] for name, steps in hulls.items()}
    room = budget - sum(choice.size for choice in chosen.values())
    if room < 0:
        raise CompressionError(
            f"the smallest artifact is {-room} bytes larger than the target: ask for more bits or a lower ratio"
        )
    # (negative gain a byte, matrix, step on its hull): ties go by name, so that the result is always the same.
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
    """The choices on the lower convex hull, by size: each step costs more for what it gains than the one before."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.size, choice.cost)):
        if found and choice.cost >= found[-1].cost:
            continue
        while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-1], choice):
            found.pop()
        found.append(choice)
    return found


def _gain(smaller: Choice, larger: Choice) -> float:
    """Cost taken away by each byte more."""
    return (smaller.cost - larger.cost) / (larger.size - smaller.size)
