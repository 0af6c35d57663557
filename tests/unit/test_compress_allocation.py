"""Bit allocation: never over budget, and as good as trying every combination."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltazip_ray.compress.allocation import Choice, allocate, hull
from deltazip_ray.errors import CompressionError

SIZES = (0, 1, 2, 3, 4, 16)
CODINGS = ("absent", "int1", "int2", "int3", "int4", "raw")


def choices(costs: tuple[float, ...], scale: int = 1) -> list[Choice]:
    return [Choice(coding, scale * size, cost) for coding, size, cost in zip(CODINGS, SIZES, costs, strict=True)]  # type: ignore[arg-type]


MATRICES = st.lists(
    st.tuples(
        st.lists(st.floats(0, 100), min_size=len(SIZES), max_size=len(SIZES)).map(tuple),
        st.integers(min_value=1, max_value=3),
    ).map(lambda given: choices(*given)),
    min_size=1,
    max_size=4,
)


@given(MATRICES, st.integers(0, 200))
def test_allocation_keeps_its_budget(matrices: list[list[Choice]], budget: int) -> None:
    chosen = allocate({str(i): options for i, options in enumerate(matrices)}, budget)
    assert sum(choice.size for choice in chosen.values()) <= budget


@given(MATRICES, st.floats(0.001, 100))
def test_a_walk_that_stops_at_a_slope_is_optimal(matrices: list[list[Choice]], slope: float) -> None:
    """Where the budget is what the walk has spent when it has taken all steps steeper than ``slope``."""
    taken = [min(options, key=lambda choice: (choice.cost + slope * choice.size, choice.size)) for options in matrices]
    budget = sum(choice.size for choice in taken)
    chosen = allocate({str(i): options for i, options in enumerate(matrices)}, budget)
    best = min(
        sum(choice.cost for choice in combination)
        for combination in product(*matrices)
        if sum(choice.size for choice in combination) <= budget
    )
    assert sum(choice.cost for choice in chosen.values()) == pytest.approx(best, abs=1e-6)


def test_bytes_go_where_they_take_away_most() -> None:
    chosen = allocate({"flat": choices((2, 1, 1, 1, 1, 0)), "steep": choices((99, 60, 30, 9, 3, 0))}, 5)
    assert (chosen["steep"].coding, chosen["flat"].coding) == ("int4", "int1")


def test_a_choice_that_costs_more_for_as_many_bytes_is_never_taken() -> None:
    better, worse = Choice("int2", 2, 1.0), Choice("sparse24_int2", 2, 3.0)
    assert hull([worse, better, Choice("absent", 0, 9.0)]) == [Choice("absent", 0, 9.0), better]


def test_a_matrix_that_costs_nothing_is_absent() -> None:
    assert allocate({"same": choices((0, 0, 0, 0, 0, 0))}, 100)["same"].coding == "absent"


def test_a_target_below_the_smallest_artifact() -> None:
    with pytest.raises(CompressionError, match="3 bytes larger than the target: ask for more bits or a lower ratio"):
        allocate({"large": [Choice("raw", 8, 0.0)]}, 5)
