"""Which version leaves its slot, and slots that are given up on purpose."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from deltazip_deployments.node_store.succession import Succession
from deltazip_ray.artifact.variants import Variant
from deltazip_ray.residency.slot_entries import AskSlot, Pin
from deltazip_ray.residency.slot_table import SlotTable
from deltazip_ray.residency.tiers import Tier


async def load(ask_slot: AskSlot) -> Tier:
    await ask_slot()
    return "host"


class Bench:
    def __init__(self) -> None:
        self.costs: dict[str, float] = {}
        self.table = SlotTable(2, cost=lambda version: self.costs.get(version, 1.0))

    async def pin(self, version: str) -> Pin:
        pin = await self.table.pin(version, load)
        self.table.check()
        return pin

    def unpin(self, pin: Pin) -> None:
        self.table.unpin(pin)
        self.table.check()

    async def use(self, *versions: str) -> None:
        for version in versions:
            self.unpin(await self.pin(version))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.table.close()
    made.table.check()


async def test_a_popular_version_outlives_one_that_was_used_last(bench: Bench) -> None:
    await bench.use("a", "a", "a", "b", "c")
    assert bench.table.resident == {"a", "c"}


async def test_a_popular_version_is_known_when_it_comes_back(bench: Bench) -> None:
    await bench.use("a", "a", "a", "b", "b", "c", "c", "c", "c", "d", "a", "d")
    assert bench.table.resident == {"c", "d"} or bench.table.resident == {"a", "d"}
    await bench.use("a", "e")
    assert "a" in bench.table.resident


async def test_a_version_that_is_far_away_stays(bench: Bench) -> None:
    bench.costs = {"a": 20.0, "b": 0.05}
    await bench.use("a", "b", "b", "b", "c")
    assert bench.table.resident == {"a", "c"}


async def test_a_discarded_version_frees_its_slot_at_once_or_with_its_last_pin(bench: Bench) -> None:
    await bench.use("a")
    pins = [await bench.pin("b"), await bench.pin("b")]
    bench.table.discard("a")
    bench.table.discard("b")
    bench.table.discard("never heard of")
    bench.table.check()
    assert bench.table.resident == {"b"}
    assert bench.table.has_room
    pins.append(await bench.pin("b"))
    for pin in pins[:2]:
        bench.unpin(pin)
    assert bench.table.resident == {"b"}
    bench.unpin(pins[2])
    assert bench.table.resident == set()
    assert bench.table.evictions == 0


async def test_a_slot_that_was_given_up_goes_to_who_waits(bench: Bench) -> None:
    one, other = await bench.pin("a"), await bench.pin("b")
    assert not bench.table.has_room
    waiting = asyncio.create_task(bench.pin("c"))
    await asyncio.sleep(0)
    bench.table.discard("a")
    bench.unpin(one)
    pin = await waiting
    assert pin.slot == one.slot
    assert bench.table.resident == {"b", "c"}
    for each in (other, pin):
        bench.unpin(each)


async def test_a_version_that_comes_is_not_discarded(bench: Bench) -> None:
    waiting = asyncio.create_task(bench.pin("a"))
    await asyncio.sleep(0)
    bench.table.discard("a")
    bench.unpin(await waiting)
    assert bench.table.resident == {"a"}


def variants(**aliases: dict[str, str]) -> list[Variant]:
    """Variant name to alias to one letter that stands for a digest."""
    return [
        Variant(name=name, aliases={a: v * 64 for a, v in named.items()}, versions=[])
        for name, named in aliases.items()
    ]


def letters(pairs: frozenset[tuple[str, str]]) -> set[str]:
    return {old[0] + new[0] for old, new in pairs}


def test_the_old_version_goes_some_time_after_its_last_alias() -> None:
    succession = Succession(grace_s=10)
    first = succession.update(variants(x={"latest": "a", "prod": "a"}, y={"latest": "b"}), 0)
    assert not first.heirs | first.retired
    moved = succession.update(variants(x={"latest": "c", "prod": "a"}, y={"latest": "b"}), 5)
    assert (letters(moved.heirs), moved.retired) == ({"ac"}, frozenset())
    assert not succession.update(variants(x={"latest": "c", "prod": "a"}, y={"latest": "b"}), 50).retired
    removed = succession.update(variants(x={"latest": "c", "prod": "c"}), 60)
    assert letters(removed.heirs) == {"ac"}
    assert not succession.update(variants(x={"latest": "c", "prod": "c"}), 69).retired
    assert succession.update(variants(x={"latest": "c", "prod": "c"}), 70).retired == {"a" * 64, "b" * 64}
    assert not succession.update(variants(x={"latest": "c", "prod": "c"}), 90).retired, "told once"


def test_a_version_that_gets_an_alias_again_stays() -> None:
    succession = Succession(grace_s=10)
    for now, version in enumerate("ababab"):
        assert not succession.update(variants(x={"latest": version}), now * 8).retired
    assert succession.update(variants(x={"latest": "b"}), 100).retired == {"a" * 64}
