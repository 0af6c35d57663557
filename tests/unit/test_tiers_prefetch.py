"""Prefetches and discards on the host: behind what is wanted, out of the way when room is short, really freed."""

import asyncio
import functools
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from threading import Event

import pytest
from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.config import NodeStoreConfig
from deltazip_ray.errors import StoreFull
from deltazip_ray.residency.arena import ALIGNMENT
from deltazip_ray.residency.fetch_pool import FetchPool
from deltazip_ray.residency.host_cache import HostCache
from tests.support.faulty_store import Fault, FaultyStore
from tests.support.plain_versions import BASE, put_version
from tests.support.waiting import until

PAGES = 6


class Bench:
    """A cache of six pages with three threads over a folder that can be stopped."""

    def __init__(self, folder: Path) -> None:
        self.store = FaultyStore(folder / "store")
        self.catalog = Catalog(self.store, BASE)
        settings = NodeStoreConfig(fetch_threads=3, room_timeout_s=0.5, disk_dir=folder / "disk")
        self.cache = HostCache(self.catalog, bytearray(PAGES * ALIGNMENT), settings, CollectorRegistry())

    def version(self, *fills: str) -> str:
        """A version of one page for each letter; equal letters are equal blobs."""
        blobs = {f"layers.{index}": fill.encode() * (ALIGNMENT - 7) for index, fill in enumerate(fills)}
        return put_version(self.catalog, blobs)

    def digest(self, fill: str) -> str:
        return self.catalog.manifest(self.version(fill)).blobs[0].digest

    async def know(self, *versions: str) -> None:
        """Have the cache read the manifests, so that nothing but blobs is left to read."""
        for version in versions:
            await self.cache._manifests.get(version)

    async def use(self, version: str) -> str:
        tier = (await self.cache.acquire(version)).tier
        await self.cache.release(version)
        self.cache.check()
        return tier

    def blob_reads(self) -> list[str]:
        return [key.rpartition("/")[2] for key in self.store.reads if "/blobs/" in key]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.gate.set()
    await made.cache.close()
    made.cache.check()
    assert made.cache.stats().held_bytes == 0


async def test_what_was_prefetched_is_there(bench: Bench) -> None:
    version = bench.version(*"ab")
    assert bench.cache.seconds_away(version) > 0
    assert all(await asyncio.gather(bench.cache.prefetch(version), bench.cache.prefetch(version)))
    assert bench.cache.seconds_away(version) == 0.0
    assert await bench.use(version) == "host"
    assert len(bench.blob_reads()) == 2


async def test_a_version_that_somebody_waits_for_passes_those_that_are_prefetched(bench: Bench) -> None:
    ahead, wanted = bench.version(*"abc"), bench.version(*"xy")
    await bench.know(ahead, wanted)
    bench.store.gate.clear()
    hint = asyncio.create_task(bench.cache.prefetch(ahead))
    for _ in range(20):
        await asyncio.sleep(0.001)
    waiting = asyncio.create_task(bench.cache.acquire(wanted))
    for _ in range(20):
        await asyncio.sleep(0.001)
    bench.store.gate.set()
    await waiting
    assert await hint
    order = bench.blob_reads()
    assert order[0] == bench.digest("a"), "one thread of two is for prefetches, the other one waits for demand"
    assert set(order[1:3]) == {bench.digest("x"), bench.digest("y")}
    await bench.cache.release(wanted)


async def test_a_prefetch_that_somebody_asks_for_is_in_no_hurry_no_more(bench: Bench) -> None:
    first, second = bench.version(*"abc"), bench.version(*"xyz")
    await bench.know(first, second)
    bench.store.gate.clear()
    hints = [asyncio.create_task(bench.cache.prefetch(version)) for version in (first, second)]
    for _ in range(20):
        await asyncio.sleep(0.001)
    waiting = asyncio.create_task(bench.cache.acquire(second))
    for _ in range(20):
        await asyncio.sleep(0.001)
    bench.store.gate.set()
    await waiting
    await asyncio.gather(*hints)
    order = bench.blob_reads()
    assert max(map(order.index, map(bench.digest, "xyz"))) < max(map(order.index, map(bench.digest, "bc")))
    await bench.cache.release(second)


async def test_a_prefetch_gives_way_when_memory_is_short(bench: Bench) -> None:
    ahead, wanted = bench.version(*"abcd"), bench.version(*"vwxyz")
    await bench.know(ahead, wanted)
    bench.store.gate.clear()
    hint = asyncio.create_task(bench.cache.prefetch(ahead))
    for _ in range(20):
        await asyncio.sleep(0.001)
    waiting = asyncio.create_task(bench.cache.acquire(wanted))
    await asyncio.sleep(0.05)
    bench.store.gate.set()
    assert (await waiting).tier == "remote"
    assert not await hint
    assert set(bench.blob_reads()) == set(map(bench.digest, "avwxyz")), "what had not begun was dropped"
    await bench.cache.release(wanted)


async def test_a_prefetch_waits_for_no_room_and_disturbs_nobody(bench: Bench) -> None:
    kept = bench.version(*"abcde")
    await bench.cache.acquire(kept)
    assert not await bench.cache.prefetch(bench.version(*"xy"))
    bench.store.faults = [Fault("unavailable")]
    assert not await bench.cache.prefetch(bench.version("z"))
    await bench.cache.release(kept)


async def test_hints_beyond_a_few_are_dropped(bench: Bench) -> None:
    versions = [bench.version(fill) for fill in "abcdef"]
    bench.store.gate.clear()
    hints = [asyncio.create_task(bench.cache.prefetch(version)) for version in versions]
    await asyncio.sleep(0.05)
    bench.store.gate.set()
    assert await asyncio.gather(*hints) == [True] * 4 + [False] * 2


async def test_a_hint_for_what_is_discarded_is_dropped(bench: Bench) -> None:
    version = bench.version(*"ab")
    await bench.know(version)
    bench.store.gate.clear()
    hint = asyncio.create_task(bench.cache.prefetch(version))
    await until(lambda: bench.store.reading > 0)
    await bench.cache.discard(version)
    assert not await hint
    bench.store.gate.set()
    await until(lambda: not bench.cache.stats().blobs)


async def test_what_is_discarded_is_gone_but_not_what_others_share(bench: Bench, tmp_path: Path) -> None:
    gone, stays = bench.version(*"abc"), bench.version(*"cd")
    for version in (gone, stays):
        await bench.use(version)
    await until(lambda: len(list((tmp_path / "disk").glob("*-*"))) == 6)  # four blobs and two manifests
    free = bench.cache.stats().free_bytes
    await bench.cache.discard(gone)
    assert bench.cache.stats().free_bytes == free + 2 * ALIGNMENT
    assert bench.cache.versions == {stays}
    assert await bench.use(gone) == "disk"
    await bench.cache.discard(gone, disk=True)
    assert len(list((tmp_path / "disk").glob("*-*"))) == 3
    assert await bench.use(stays) == "host"
    assert await bench.use(gone) == "remote"


async def test_what_is_held_goes_when_it_is_let_go_unless_somebody_came_for_it(bench: Bench) -> None:
    version, other = bench.version(*"ab"), bench.version(*"xy")
    for one in (version, other):
        await bench.cache.acquire(one)
        await bench.cache.discard(one)
    assert bench.cache.stats().held_bytes == 4 * ALIGNMENT
    await bench.cache.acquire(other)
    await bench.cache.release(version)
    assert bench.cache.stats().blobs == 2
    for _ in range(2):
        await bench.cache.release(other)
    assert bench.cache.stats().blobs == 2
    assert await bench.use(other) == "host"


async def test_the_one_that_is_worth_least_leaves(bench: Bench) -> None:
    popular, once = bench.version(*"ab"), bench.version(*"cd")
    for _ in range(3):
        await bench.use(popular)
    await bench.use(once)
    await bench.use(bench.version(*"wxyz"))
    assert popular in bench.cache.versions
    assert once not in bench.cache.versions


async def test_what_is_on_disk_leaves_before_what_is_not(bench: Bench, tmp_path: Path) -> None:
    near, far = bench.version(*"ab"), bench.version(*"cd")
    await bench.use(near)
    await until(lambda: len(list((tmp_path / "disk").glob("*-*"))) == 3)
    await bench.use(far)
    await bench.use(near)  # more popular and more recent, but soon back
    await until(lambda: len(list((tmp_path / "disk").glob("*-*"))) == 6)
    for path in (tmp_path / "disk").glob("*-*"):
        if path.name.startswith((bench.digest("c"), bench.digest("d"))):
            path.unlink()
            bench.cache._disk.discard([(path.name[:64], ALIGNMENT - 7)])  # type: ignore[union-attr]
    await bench.use(bench.version(*"wxyz"))
    assert far in bench.cache.versions
    assert near not in bench.cache.versions


async def test_an_arena_of_prefetches_is_not_full(bench: Bench) -> None:
    await bench.cache.prefetch(bench.version(*"abcd"))
    await bench.use(bench.version(*"uvwxyz"))
    with pytest.raises(StoreFull):
        await bench.cache.acquire(bench.version(*"abcdefg"))


async def test_jobs_ahead_of_demand_have_half_of_the_threads() -> None:
    pool, gate, begun = FetchPool[str](4, shared=False), Event(), list[str]()
    ended: list[str] = []

    def work(name: str) -> str:
        begun.append(name)
        assert gate.wait(20)
        return name

    def done(result: Future[str]) -> None:
        ended.append(result.result())

    jobs = [
        pool.submit("a", functools.partial(work, name), done, ahead=True) for name in ("a0", "a1", "a2", "a3", "a4")
    ]
    await asyncio.sleep(0.02)
    assert sorted(begun) == ["a0", "a1"]
    for job in jobs:
        pool.hasten(job)
    await asyncio.sleep(0.02)
    assert sorted(begun) == ["a0", "a1", "a2", "a3"], "somebody waits for them now"
    assert pool.cancel(jobs[4])
    gate.set()
    await until(lambda: len(ended) == 4)
    pool.submit("b", functools.partial(work, "b0"), done, ahead=True)
    await until(lambda: ended[-1] == "b0")
    await asyncio.to_thread(pool.shutdown)
