"""What is worth keeping: how often and how recently it was used, and what bringing it back costs."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltazip_ray.errors import ConfigError
from deltazip_ray.residency.popularity import Popularity


def order(popularity: Popularity[str], keys: str = "abcd") -> str:
    """The keys, those that leave first in front."""
    return "".join(sorted(keys, key=lambda key: popularity.worth(key, 1.0)))


def test_of_equally_popular_ones_the_least_recent_leaves_first() -> None:
    popularity = Popularity[str]()
    for key in "cabd":
        popularity.used((key,))
    assert order(popularity) == "cabd"


def test_one_that_is_used_often_outlives_one_that_was_used_last() -> None:
    popularity = Popularity[str]()
    for key in "aabbbcd":
        popularity.used((key,))
    assert order(popularity) == "cdab"


def test_with_a_half_life_of_one_use_only_recency_counts() -> None:
    popularity = Popularity[str](half_life=1)
    rng, last = random.Random(0), dict.fromkeys("abcd", -1)
    for key in "abcd":
        popularity.used((key,))
    for now in range(200):
        key = rng.choice("aaaabcd")
        popularity.used((key,))
        last[key] = now
        assert order(popularity) == "".join(sorted("abcd", key=lambda k: last[k])), now


def test_old_popularity_fades() -> None:
    popularity = Popularity[str](half_life=10)
    for _ in range(100):
        popularity.used(("a",))
    for _ in range(100):
        popularity.used(("b",))
    assert order(popularity, "ab") == "ab"
    assert popularity.worth("b", 1.0) - popularity.worth("a", 1.0) == pytest.approx(10, abs=0.1), "half-lives"


def test_what_was_used_long_ago_can_be_used_again() -> None:
    popularity = Popularity[str](half_life=1)
    popularity.used(("a",))
    for _ in range(5000):
        popularity.used(("b",))
    popularity.used(("a",))
    popularity.used(("a",))
    assert order(popularity, "ab") == "ba"


def test_what_is_far_away_stays_rather_than_what_is_near() -> None:
    popularity = Popularity[str]()
    for key in "aabb":
        popularity.used((key,))
    assert popularity.worth("a", 0.5) > popularity.worth("b", 0.01)
    assert popularity.worth("b", 1.0) > popularity.worth("a", 0.0) > -math.inf
    assert popularity.worth("never used", 1e9) == -math.inf


@given(st.lists(st.sets(st.sampled_from("abcd"), min_size=1), max_size=200), st.floats(1, 50))
def test_the_counts_are_sums_of_what_is_left_of_each_use(uses: list[set[str]], half_life: float) -> None:
    popularity = Popularity[str](half_life)
    for keys in uses:
        popularity.used(sorted(keys))
    counts = {
        key: sum(2 ** ((when - len(uses)) / half_life) for when, keys in enumerate(uses, 1) if key in keys)
        for key in "abcd"
    }
    for one, other in itertools.combinations([key for key in counts if counts[key]], 2):
        expected = math.log2(counts[one] / counts[other])
        assert popularity.worth(one, 1.0) - popularity.worth(other, 1.0) == pytest.approx(expected, abs=1e-6)


def test_names_without_end_do_not_fill_the_memory_and_the_popular_ones_are_kept() -> None:
    popularity = Popularity[int](half_life=1e9)
    for number in range(150_000):
        popularity.used((-1, number))
    assert len(popularity._scores) <= 65536
    assert popularity.worth(-1, 1.0) > popularity.worth(149_999, 1.0) > -math.inf


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Popularity[str](0.5)
