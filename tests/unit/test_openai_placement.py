"""Placement as a policy: who gets which request, without Ray."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from deltazip_deployments.placement import Costs, Heat, ReplicaView, choose, cost, spill_target

COSTS = Costs()
IDLE = ReplicaView(slots=4, capacity=8)


def test_a_warm_replica_wins_over_an_idle_cold_one() -> None:
    views = {"cold": IDLE, "warm": replace(IDLE, device=frozenset({"v"}), ongoing=6)}
    assert choose(views, "v", COSTS) == "warm"


def test_a_long_queue_outweighs_a_load() -> None:
    views = {"cold": IDLE, "warm": replace(IDLE, device=frozenset({"v"}), ongoing=30)}
    assert choose(views, "v", COSTS) == "cold"


def test_the_nearer_tier_wins() -> None:
    tiers = {
        "device": replace(IDLE, device=frozenset({"v"})),
        "loading from host": replace(IDLE, loading=frozenset({"v"}), host=frozenset({"v"})),
        "host": replace(IDLE, host=frozenset({"v"})),
        "loading": replace(IDLE, loading=frozenset({"v"})),
        "remote": IDLE,
        "remote, full": replace(IDLE, device=frozenset("abcd")),
    }
    seconds = [cost(view, "v", COSTS) for view in tiers.values()]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == len(seconds)


def test_the_base_goes_where_the_queue_is_shortest() -> None:
    views = {
        "a": replace(IDLE, ongoing=3),
        "b": replace(IDLE, ongoing=2, device=frozenset("abcd")),
        "c": replace(IDLE, ongoing=9),
    }
    assert choose(views, None, COSTS) == "b"


def test_cold_versions_spread_over_equal_replicas_the_same_way_for_every_router() -> None:
    views = dict.fromkeys("abcd", IDLE)
    first = {f"v{i}": choose(views, f"v{i}", COSTS) for i in range(400)}
    again = {f"v{i}": choose(dict.fromkeys("dcba", IDLE), f"v{i}", COSTS) for i in range(400)}
    assert first == again
    assert min(Counter(first.values()).values()) > 60


@given(
    ongoing=st.integers(0, 200),
    capacity=st.integers(1, 64),
    resident=st.booleans(),
    host=st.booleans(),
    loading=st.booleans(),
)
def test_one_more_request_never_makes_a_replica_cheaper(
    ongoing: int, capacity: int, resident: bool, host: bool, loading: bool
) -> None:
    view = ReplicaView(
        device=frozenset("v" if resident else ""),
        host=frozenset("v" if host else ""),
        loading=frozenset("v" if loading else ""),
        slots=2,
        ongoing=ongoing,
        capacity=capacity,
    )
    assert 0 <= cost(view, "v", COSTS) < cost(replace(view, ongoing=ongoing + 1), "v", COSTS)
    assert cost(view, None, COSTS) <= cost(view, "v", COSTS)


def test_a_version_is_prefetched_where_it_would_go_if_it_were_twice_as_hot() -> None:
    warm = ReplicaView(device=frozenset("v"), slots=4, capacity=8)
    cold = ReplicaView(slots=4, capacity=8)
    near = ReplicaView(host=frozenset("v"), slots=4, capacity=8)

    def target(ongoing: int, other: ReplicaView) -> str | None:
        return spill_target({"home": replace(warm, ongoing=ongoing), "other": other}, "v", Costs())

    assert target(1, cold) is None
    assert target(5, cold) is None, "twice as many wait for a second, loading takes two"
    assert target(6, cold) == "other"
    assert target(3, near) == "other"
    assert target(6, replace(cold, loading=frozenset("v"))) is None
    assert target(6, replace(cold, device=frozenset("v"))) is None
    assert spill_target({"only": replace(warm, ongoing=100)}, "v", Costs()) is None


def test_a_version_is_hot_at_four_requests_and_each_time_they_double() -> None:
    heat = Heat()
    assert [n for n in range(1, 40) if heat.began("v")] == [4, 8, 16, 32]
    assert not heat.began("w")
    for _ in range(35):
        heat.ended("v")
    assert [n for n in range(5, 90) if heat.began("v")] == [64], "it has been told of before"
    for _ in range(89):
        heat.ended("v")
    assert [n for n in range(1, 5) if heat.began("v")] == [4], "it was cold meanwhile"
