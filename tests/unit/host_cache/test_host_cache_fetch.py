"""The host tier over a real folder store: what is fetched, shared, held and counted."""

import asyncio
import mmap
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.object_store import Pieces
from deltazip_ray.config import NodeStoreConfig
from deltazip_ray.errors import (
    ConfigError,
    StoreError,
    StoreUnavailable,
)
from deltazip_ray.residency.arena import ALIGNMENT
from deltazip_ray.residency.host_cache import HostCache
from tests.support.host_bench import Bench, as_bytes, page
from tests.support.waiting import until


async def test_a_version_is_brought_from_the_store_and_found_in_memory_after_that(bench: Bench) -> None:
    version = bench.version("a", "b")
    first, second = await bench.cache.acquire(version), await bench.cache.acquire(version)
    assert (first.tier, second.tier) == ("remote", "host")
    assert as_bytes(first.blobs) == as_bytes(second.blobs) == {"layers.0": page("a"), "layers.1": page("b")}
    assert bench.store.count("/blobs/") == 2
    assert bench.store.count("/versions/") == 1
    assert first.manifest.version() == version
    assert bench.cache.versions == {version}


async def test_the_store_gives_no_more_than_the_budget(bench: Bench) -> None:
    settings = NodeStoreConfig(fetch_bytes_per_s=100_000)
    cache = HostCache(bench.catalog, bench.arena, settings, CollectorRegistry())
    began = time.monotonic()
    await cache.acquire(bench.version(*"abcdefg"))
    # A burst of a tenth of a second passes at once, and the last blob when the others are paid for.
    assert time.monotonic() - began > 6 * len(page("a")) / 100_000 - 0.1
    await cache.close()


async def test_views_are_read_only_and_lie_where_offsets_says(bench: Bench) -> None:
    version = bench.version("a", "b")
    delta = await bench.cache.acquire(version)
    for block, (offset, size) in bench.cache.offsets(version).items():
        assert delta.blobs[block].readonly
        assert offset % ALIGNMENT == 0
        assert bench.arena[offset : offset + size] == delta.blobs[block]


async def test_an_mmap_can_be_the_arena(bench: Bench) -> None:
    version = bench.version("a")
    arena = memoryview(mmap.mmap(-1, 4 * ALIGNMENT))
    cache = HostCache(bench.catalog, arena, NodeStoreConfig(), CollectorRegistry())
    assert as_bytes((await cache.acquire(version)).blobs) == {"layers.0": page("a")}
    await cache.close()


async def test_concurrent_acquires_make_one_fetch(bench: Bench) -> None:
    version = bench.version("a", "b")
    bench.store.latency_s = 0.02
    deltas = await asyncio.gather(*(bench.cache.acquire(version) for _ in range(5)))
    assert {delta.tier for delta in deltas} == {"remote"}
    assert (bench.store.count("/blobs/"), bench.store.count("/versions/")) == (2, 1)


async def test_versions_that_share_blobs_fetch_them_once(bench: Bench) -> None:
    one, two = bench.version("a", "b", "c"), bench.version("a", "b", "d")
    bench.store.latency_s = 0.02
    await asyncio.gather(bench.cache.acquire(one), bench.cache.acquire(two))
    assert bench.store.count("/blobs/") == 4
    assert bench.cache.stats().held_bytes == 4 * ALIGNMENT
    await bench.cache.release(one)
    assert bench.cache.stats().held_bytes == 3 * ALIGNMENT
    bench.cache.check()


async def test_a_version_whose_blocks_are_equal_holds_them_once(bench: Bench) -> None:
    version = bench.version(*"aaaaaaaaaaaa")
    assert len((await bench.cache.acquire(version)).blobs) == 12
    assert bench.cache.stats().held_bytes == ALIGNMENT
    await bench.cache.release(version)
    assert bench.cache.stats().held_bytes == 0


async def test_blobs_are_fetched_in_parallel(bench: Bench) -> None:
    version = bench.version(*"abcdefgh")
    bench.store.latency_s = 0.02
    await bench.cache.acquire(version)
    assert bench.store.most_reading == 3, "of four threads one is left to others"


async def test_versions_that_hang_leave_threads_to_the_others(bench: Bench) -> None:
    """Two versions whose reads hang have all the threads that they may have, and another one is served meanwhile."""
    settings = NodeStoreConfig(fetch_threads=8)
    cache = HostCache(bench.catalog, bytearray(20 * ALIGNMENT), settings, CollectorRegistry())
    slow, quick = (bench.version(*"abcdefgh"), bench.version(*"ABCDEFGH")), bench.version("x", "y", "z")
    hangs = {entry.digest for version in slow for entry in bench.catalog.manifest(version).blobs}
    gate, sound = threading.Event(), bench.store.pieces

    def pieces(key: str, buffer: memoryview) -> Pieces:
        if key.rpartition("/")[2] in hangs:
            assert gate.wait(20)
        return sound(key, buffer)

    bench.store.pieces = pieces  # type: ignore[method-assign]
    waiting = asyncio.gather(*map(cache.acquire, slow))
    await until(lambda: cache.stats().fetching == 16)
    async with asyncio.timeout(10):
        await cache.acquire(quick)
    assert not waiting.done()
    gate.set()
    await waiting
    await cache.close()


@pytest.mark.parametrize("stage", ["manifest", "blobs"])
async def test_a_caller_that_leaves_does_not_stop_the_others(bench: Bench, stage: str) -> None:
    version = bench.version("a", "b")
    if stage == "blobs":
        await bench.know(version)
    bench.store.gate.clear()
    first, second = await bench.start(version), await bench.start(version)
    first.cancel()
    await asyncio.sleep(0)
    bench.store.gate.set()
    await second
    assert first.cancelled()
    assert bench.store.count("/blobs/") == 2
    assert bench.cache.stats().held_bytes == 2 * ALIGNMENT
    await bench.cache.release(version)
    assert bench.cache.stats().held_bytes == 0, "the one who left holds nothing"


async def test_when_all_have_left_begun_fetches_stay_and_the_others_are_dropped(bench: Bench) -> None:
    version = bench.version(*"abcdefgh")
    await bench.know(version)
    bench.store.gate.clear()
    task = await bench.start(version)
    await until(lambda: bench.store.reading == 3)
    task.cancel()
    await asyncio.sleep(0)
    bench.cache.check()
    assert bench.cache.stats().blobs == 3, "one for each thread"
    bench.store.gate.set()
    await until(lambda: not bench.cache.stats().fetching)
    assert bench.store.count("/blobs/") == 3
    assert (bench.cache.stats().held_bytes, bench.cache.stats().cached_bytes) == (0, 3 * ALIGNMENT)


async def test_close_answers_everybody(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room_timeout_s=20, fetch_threads=1)
    held, wanted, behind = bench.version("a", pages=6), bench.version("b", pages=3), bench.version("c", pages=3)
    one_by_one = bench.version("y", "z")
    await bench.know(wanted, behind, one_by_one)
    await bench.cache.acquire(held)
    bench.store.gate.clear()
    fetching = await bench.start(one_by_one)
    waiting = [await bench.start(wanted), await bench.start(behind)]
    threading.Timer(0.05, bench.store.gate.set).start()
    await bench.cache.close()
    results = await asyncio.gather(fetching, *waiting, return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 3
    with pytest.raises(StoreUnavailable):
        await bench.cache.acquire(held)
    await bench.cache.release(held)
    bench.cache.check()


async def test_a_version_is_released_once_for_each_acquire(bench: Bench) -> None:
    version = bench.version("a")
    await bench.cache.acquire(version)
    await bench.cache.release(version)
    with pytest.raises(StoreError, match="not held"):
        await bench.cache.release(version)


async def test_a_read_only_arena_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="read-only"):
        HostCache(bench.catalog, memoryview(bytes(ALIGNMENT)), NodeStoreConfig(), CollectorRegistry())


async def test_the_metrics_tell_what_happened(bench: Bench) -> None:
    version = bench.version("a", "b")
    await bench.cache.acquire(version)
    await bench.cache.acquire(version)
    await bench.cache.acquire(bench.version("c"))
    await bench.cache.release(version)
    await bench.cache.release(version)
    assert bench.metric("acquires_total", tier="remote") == 2
    assert bench.metric("acquires_total", tier="host") == 1
    assert bench.metric("fetched_bytes_total", tier="remote") == 3 * len(page("a"))
    assert bench.metric("fetch_seconds_count", tier="remote") == 3
    states = {state: bench.metric("bytes", state=state) / ALIGNMENT for state in ("held", "cached", "free")}
    assert states == {"held": 1, "cached": 2, "free": 5}
