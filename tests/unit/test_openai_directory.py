"""The router's list of variants: how often it asks the store, and what it says while the store is away."""

import asyncio
import threading
import time

import pytest

from deltazip_deployments.router.directory import Directory
from deltazip_ray.artifact.names import parse_ref
from deltazip_ray.artifact.variants import Variant
from deltazip_ray.errors import StoreUnavailable, UnknownVariant

VERSIONS = ["a" * 64, "b" * 64]


class Store:
    """A catalog that counts how often it is read, and can be away."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.reads = 0
        self.away = False
        self.takes_s = 0.0
        self.threads: set[int] = set()

    def variants(self) -> list[Variant]:
        self.reads += 1
        self.threads.add(threading.get_ident())
        time.sleep(self.takes_s)
        if self.away:
            raise StoreUnavailable("nobody answers")
        return [Variant(name=name, aliases={"latest": VERSIONS[-1]}, versions=VERSIONS) for name in self.names]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def directory(store: Store, clock: Clock) -> Directory:
    return Directory(store, "base", 60.0, nobody, 0.0, clock)  # type: ignore[arg-type]


async def nobody(version: str) -> None:
    """Nothing to bring."""


async def test_the_base_has_no_versions() -> None:
    with pytest.raises(UnknownVariant, match="the base 'base' has neither"):
        await directory(Store("one"), Clock()).resolve(parse_ref("base@latest"))


async def test_known_names_cost_nothing() -> None:
    store, clock = Store("one"), Clock()
    names = directory(store, clock)
    for _ in range(5):
        assert await names.resolve(parse_ref("one")) == VERSIONS[1]
        assert await names.resolve(parse_ref(f"one@{VERSIONS[0][:12]}")) == VERSIONS[0]
    assert store.reads == 1
    assert threading.get_ident() not in store.threads


async def test_an_unknown_name_asks_again_but_not_more_often_than_each_second() -> None:
    store, clock = Store("one"), Clock()
    names = directory(store, clock)
    for _ in range(20):
        with pytest.raises(UnknownVariant, match="base, one"):
            await names.resolve(parse_ref("two"))
    assert store.reads == 1
    store.names = ("one", "two")
    clock.now += 1.0
    assert await names.resolve(parse_ref("two")) == VERSIONS[1]
    assert store.reads == 2


async def test_many_at_once_make_one_read() -> None:
    store, clock = Store("one"), Clock()
    store.takes_s = 0.05
    names = directory(store, clock)
    await asyncio.gather(*(names.resolve(parse_ref("one")) for _ in range(10)))
    assert store.reads == 1


async def test_a_caller_that_leaves_does_not_stop_the_read() -> None:
    store, clock = Store("one"), Clock()
    store.takes_s = 0.1
    names = directory(store, clock)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await names.resolve(parse_ref("one"))
    assert await names.resolve(parse_ref("one")) == VERSIONS[1]
    assert store.reads == 1


async def test_while_the_store_is_away_the_known_stay() -> None:
    store, clock = Store("one"), Clock()
    names = directory(store, clock)
    await names.refresh()
    store.away = True
    await names.refresh()
    assert names.problem == "nobody answers"
    assert await names.resolve(parse_ref("one")) == VERSIONS[1]
    assert [variant.name for variant in await names.variants()] == ["one"]
    store.away = False
    await names.refresh()
    assert names.problem is None


async def test_a_store_that_never_answered_says_why() -> None:
    store, clock = Store("one"), Clock()
    store.away = True
    names = directory(store, clock)
    with pytest.raises(StoreUnavailable, match="nobody answers"):
        await names.resolve(parse_ref("one"))
    with pytest.raises(StoreUnavailable, match="nobody answers"):
        await names.variants()


async def test_a_long_list_is_cut_in_the_message() -> None:
    names = directory(Store(*(f"v{i:02}" for i in range(30))), Clock())
    with pytest.raises(UnknownVariant, match="and 11 more") as refused:
        await names.resolve(parse_ref("nope"))
    assert "v25" not in refused.value.message


class Moves:
    """A catalog with one variant, and replicas that have a version brought when the test says so."""

    def __init__(self, wait_s: float = 5.0) -> None:
        self.aliases = {"latest": VERSIONS[0]}
        self.brought: list[str] = []
        self.there = asyncio.Event()
        self.clock = Clock()
        self.names = Directory(self, "base", 60.0, self.bring, wait_s, self.clock)  # type: ignore[arg-type]

    def variants(self) -> list[Variant]:
        return [Variant(name="one", aliases=self.aliases, versions=VERSIONS)]

    async def bring(self, version: str) -> None:
        self.brought.append(version)
        await self.there.wait()

    async def move(self, **aliases: str) -> None:
        self.aliases = aliases
        await self.names.refresh()
        await asyncio.sleep(0)

    async def resolve(self, alias: str = "latest") -> str:
        return await self.names.resolve(parse_ref(f"one@{alias}"))


async def test_an_alias_in_use_moves_when_its_heir_is_there() -> None:
    moves = Moves()
    old, new = VERSIONS
    assert await moves.resolve() == old
    for _ in range(3):
        await moves.move(latest=new, canary=new)
        assert await moves.resolve() == old
        assert await moves.resolve("canary") == new, "this alias had no other version before"
        assert await moves.resolve(new[:12]) == new
    assert moves.brought == [new]
    moves.there.set()
    await asyncio.sleep(0.01)
    assert await moves.resolve() == new, "at once, not at the next look at the store"
    await moves.move(latest=new)
    assert (await moves.resolve(), moves.brought) == (new, [new])


async def test_an_alias_that_nobody_uses_moves_at_once() -> None:
    moves = Moves()
    old, new = VERSIONS
    assert await moves.resolve() == old
    moves.clock.now += 61
    await moves.move(latest=new)
    assert (await moves.resolve(), moves.brought) == (new, [])


async def test_an_heir_that_does_not_come_takes_over_nevertheless() -> None:
    moves = Moves(wait_s=0.05)
    assert await moves.resolve() == VERSIONS[0]
    await moves.move(latest=VERSIONS[1])
    assert await moves.resolve() == VERSIONS[0]
    await asyncio.sleep(0.1)
    assert await moves.resolve() == VERSIONS[1]


async def test_an_alias_that_moves_back_never_left() -> None:
    moves = Moves()
    old, new = VERSIONS
    assert await moves.resolve() == old
    await moves.move(latest=new)
    await moves.move(latest=old)
    moves.there.set()
    await asyncio.sleep(0.01)
    assert await moves.resolve() == old
    moves.there.clear()
    await moves.move(latest=new)
    assert await moves.resolve() == old
    assert moves.brought == [new, new]
    moves.names.close()
