"""Prefetch and unload through an engine; replacement through a node store. Real bytes, real catalog."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deltazip_deployments.node_store.actor import NodeStore
from deltazip_deployments.node_store.arena import Arena
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import MIB, NodeStoreConfig, StoreConfig
from deltazip_ray.residency.host_cache import HostCache
from tests.support.catalogs import BASE_DIGEST, publish
from tests.support.engines import GREEDY, random_prompt, running, serving
from tests.support.versions import MemorySource
from tests.support.waiting import until
from tests.support.zoo import Zoo

PROMPT = random_prompt(0, 12)


async def test_a_prefetched_version_is_warm_when_it_is_asked_for(zoo: Zoo) -> None:
    first, second = (version.version for version in zoo.versions[:2])
    async with serving(zoo, slots=2) as run:
        assert await run.engine.prefetch(first)
        assert run.engine.stats().resident == {first}
        assert await run.generate(PROMPT, first) == zoo.oracles[first].greedy(PROMPT, GREEDY.max_tokens)
        assert run.metric("first_token_seconds_count", tier="device") == 1
        assert await run.engine.prefetch(second, "host")
        assert run.engine.stats().resident == {first}
        await run.generate(PROMPT, second)
        assert run.metric("first_token_seconds_count", tier="host") == 1
        assert not await run.engine.prefetch("f" * 64)
        assert run.metric("prefetches_total", outcome="done") == 2
        assert run.metric("prefetches_total", outcome="dropped") == 1


async def test_a_prefetch_takes_no_slot_that_is_in_use(zoo: Zoo) -> None:
    first, second = (version.version for version in zoo.versions[:2])
    source = MemorySource(*zoo.versions)
    async with running(zoo.base, source, slots=1) as run:
        busy = asyncio.create_task(run.generate(PROMPT, first))
        await until(lambda: first in run.engine.stats().resident)
        assert not await run.engine.prefetch(second)
        await busy
        assert await run.engine.prefetch(second)
        assert run.engine.stats().resident == {second}


async def test_an_unloaded_version_is_nowhere_and_comes_back(zoo: Zoo) -> None:
    name = zoo.versions[2].version
    expected = zoo.oracles[name].greedy(PROMPT, GREEDY.max_tokens)
    async with serving(zoo, slots=2) as run:
        busy = asyncio.create_task(run.generate(PROMPT, name))
        await until(lambda: name in run.engine.stats().resident)
        await run.engine.unload(name)
        assert await busy == expected, "who uses it is not disturbed"
        assert run.engine.stats().resident == frozenset()
        assert await run.generate(PROMPT, name) == expected
        assert run.metric("first_token_seconds_count", tier="remote") == 2


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_replaced_version_drains_and_goes_and_its_heir_is_there_before(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    location, clock = StoreConfig(url=(tmp_path / "store").as_uri()), Clock()
    old = publish(location, tmp_path, "name", seed=0, size=60_000)
    catalog = Catalog(open_store(location), BASE_DIGEST)
    arena = Arena(tmp_path, 4 * MIB)
    cache = HostCache(catalog, arena.buffer, NodeStoreConfig(), CollectorRegistry())
    store = NodeStore("n1", cache, arena, 10.0, CollectorRegistry(), clock, retire_after_s=30.0)
    await store.follow(catalog.variants())
    await store.acquire("replica", old)
    new = publish(location, tmp_path, "name", seed=1, size=60_000)
    await store.follow(catalog.variants())
    await until(lambda: new in cache.versions and not cache._prefetches)
    clock.now = 31.0
    assert await store.retired("replica") == frozenset()
    await store.follow(catalog.variants())
    assert await store.retired("replica") == {old}
    assert await store.retired("replica") == frozenset(), "told once"
    held = cache.stats().held_bytes
    assert held > 0, "a replica still copies from it"
    await store.release("replica", old)
    assert cache.stats().held_bytes == 0
    assert cache.versions == {new}
    assert cache.stats().free_bytes == 4 * MIB - cache.stats().cached_bytes
    cache.check()
    await cache.close()


async def test_an_alias_that_moves_on_while_the_heir_loads_brings_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    location = StoreConfig(url=(tmp_path / "store").as_uri())
    first = publish(location, tmp_path, "name", seed=0, size=60_000)
    catalog = Catalog(open_store(location), BASE_DIGEST)
    arena = Arena(tmp_path, 4 * MIB)
    cache = HostCache(catalog, arena.buffer, NodeStoreConfig(), CollectorRegistry())
    store = NodeStore("n1", cache, arena, 10.0, CollectorRegistry())
    await store.follow(catalog.variants())
    await store.acquire("replica", first)
    go_on, prefetch = asyncio.Event(), cache.prefetch

    async def slow(version: str) -> bool:
        await go_on.wait()
        return await prefetch(version)

    monkeypatch.setattr(cache, "prefetch", slow)
    for seed in (1, 2):
        last = publish(location, tmp_path, "name", seed=seed, size=60_000)
        await store.follow(catalog.variants())
    go_on.set()
    await until(lambda: last in cache.versions)
    await store.release("replica", first)
    await cache.close()
