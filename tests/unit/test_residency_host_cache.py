"""The host tier over a real folder store, and over one that misbehaves."""

import asyncio
import mmap
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.object_store import Arrived, ignore
from deltazip_ray.config import BreakerConfig, NodeStoreConfig
from deltazip_ray.errors import (
    BaseMismatch,
    BlobCorrupt,
    ConfigError,
    InvalidName,
    ManifestInvalid,
    ObjectNotFound,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from deltazip_ray.residency.arena import ALIGNMENT
from deltazip_ray.residency.host_cache import HostCache
from tests.support.faulty_store import Fault, FaultyStore
from tests.support.plain_versions import BASE, make_manifest, put_manifest, put_version

PAGES = 8


def page(fill: str, pages: int = 1) -> bytes:
    """A blob that takes whole pages but is a little smaller."""
    return fill.encode() * (pages * ALIGNMENT - 7)


async def until(reached: Callable[[], bool]) -> None:
    for _ in range(5000):
        if reached():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("not reached in 5 s")


class Bench:
    """A faulty store, a catalog in it and a cache of PAGES pages over it."""

    def __init__(self, folder: Path, room_timeout_s: float = 0.05, fetch_threads: int = 4) -> None:
        self.store = FaultyStore(folder)
        self.catalog = Catalog(self.store, BASE)
        self.registry = CollectorRegistry()
        self.arena = bytearray(PAGES * ALIGNMENT)
        self.later_s = 0.0
        """What the cache's clock is ahead."""
        settings = NodeStoreConfig(
            fetch_threads=fetch_threads,
            fetch_threads_per_version=fetch_threads,
            room_timeout_s=room_timeout_s,
            breaker=BreakerConfig(failures=3, backoff_s=100, backoff_max_s=1000),
            quarantine_s=1000,
        )
        clock = lambda: time.monotonic() + self.later_s  # noqa: E731
        self.cache = HostCache(self.catalog, self.arena, settings, self.registry, clock)

    def version(self, *fills: str, pages: int = 1) -> str:
        """A version of one blob for each letter; equal letters are equal blobs."""
        return put_version(self.catalog, {f"layers.{i}": page(fill, pages) for i, fill in enumerate(fills)})

    async def know(self, *versions: str) -> None:
        """Have the cache read the manifests, so that nothing but blobs is left to read."""
        self.store.faults = [Fault("unavailable", "/blobs/")]
        for version in versions:
            with pytest.raises(StoreUnavailable):
                await self.cache.acquire(version)
        await until(lambda: not self.cache.stats().fetching)
        self.store.faults, self.store.reads = [], []

    async def start(self, version: str) -> asyncio.Task[object]:
        """An acquire that has come as far as it can without the store."""
        task: asyncio.Task[object] = asyncio.create_task(self.cache.acquire(version))
        for _ in range(5):
            await asyncio.sleep(0)
        self.cache.check()
        return task

    def metric(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"deltazip_host_{name}", labels)
        return value or 0.0


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.gate.set()
    await made.cache.close()
    made.cache.check()


@pytest.fixture(autouse=True)
async def no_error_in_a_callback() -> AsyncIterator[None]:
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    yield
    assert problems == []


def as_bytes(blobs: Mapping[str, memoryview]) -> dict[str, bytes]:
    return {block: bytes(view) for block, view in blobs.items()}


async def test_a_version_is_brought_from_the_store_and_found_in_memory_after_that(bench: Bench) -> None:
    version = bench.version("a", "b")
    first, second = await bench.cache.acquire(version), await bench.cache.acquire(version)
    assert (first.tier, second.tier) == ("remote", "host")
    assert as_bytes(first.blobs) == as_bytes(second.blobs) == {"layers.0": page("a"), "layers.1": page("b")}
    assert bench.store.count("/blobs/") == 2
    assert bench.store.count("/versions/") == 1
    assert first.manifest.version() == version
    assert bench.cache.versions == {version}


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
    assert bench.store.most_reading == 4


async def test_one_version_leaves_threads_to_the_others(bench: Bench) -> None:
    """A version whose reads hang has all the threads that it may have, and another one is served meanwhile."""
    settings = NodeStoreConfig(fetch_threads=4)
    cache = HostCache(bench.catalog, bytearray(20 * ALIGNMENT), settings, CollectorRegistry())
    slow, quick = bench.version(*"abcdefgh"), bench.version("x", "y", "z")
    hangs = {entry.digest for entry in bench.catalog.manifest(slow).blobs}
    gate, read_into = threading.Event(), bench.store.read_into

    def read(key: str, buffer: memoryview, arrived: Arrived = ignore) -> None:
        if key.rpartition("/")[2] in hangs:
            assert gate.wait(20)
        read_into(key, buffer, arrived)

    bench.store.read_into = read  # type: ignore[method-assign]
    waiting = asyncio.create_task(cache.acquire(slow))
    await until(lambda: cache.stats().fetching == 8)
    async with asyncio.timeout(10):
        await cache.acquire(quick)
    assert not waiting.done()
    gate.set()
    await waiting
    await cache.close()


async def test_the_version_released_least_recently_leaves_first(bench: Bench) -> None:
    versions = [bench.version(fill, pages=3) for fill in "ab"]
    for version in versions:
        await bench.cache.acquire(version)
    for version in reversed(versions):
        await bench.cache.release(version)
    third = bench.version("c", pages=3)
    await bench.cache.acquire(third)
    assert bench.cache.versions == {versions[0], third}
    assert bench.metric("evictions_total") == 1


async def test_held_blobs_stay_where_they_are(bench: Bench) -> None:
    kept = bench.version("k")
    delta = await bench.cache.acquire(kept)
    where = bench.cache.offsets(kept)
    for fill in "abcdefgh":
        version = bench.version(fill, pages=6)
        await bench.cache.acquire(version)
        await bench.cache.release(version)
    assert bench.cache.offsets(kept) == where
    assert bytes(delta.blobs["layers.0"]) == page("k")


async def test_a_blob_that_came_damaged_is_fetched_again(bench: Bench) -> None:
    version = bench.version("a", "b")
    bench.store.faults = [Fault("wrong bytes", "/blobs/", 1)]
    assert as_bytes((await bench.cache.acquire(version)).blobs) == {"layers.0": page("a"), "layers.1": page("b")}
    assert bench.metric("refetches_total") == 1


@pytest.mark.parametrize("kind", ["wrong bytes", "truncated"])
async def test_a_blob_that_stays_damaged_is_refused_and_others_are_not_affected(bench: Bench, kind: str) -> None:
    bad, good = bench.version("a", "b"), bench.version("b", "c")
    digest = make_manifest({"layers.0": page("a")}).blobs[0].digest
    bench.store.faults = [Fault(kind, digest)]  # type: ignore[arg-type]
    results = await asyncio.gather(bench.cache.acquire(bad), bench.cache.acquire(good), return_exceptions=True)
    assert isinstance(results[0], BlobCorrupt)
    assert digest[:12] in str(results[0])
    assert not isinstance(results[1], BaseException)
    assert bench.store.count(digest) == 2
    assert bench.metric("failures_total", error="BlobCorrupt") == 1


async def test_a_damaged_blob_is_in_quarantine_for_a_while(bench: Bench) -> None:
    """Whichever version asks for it; and it does not matter to those who have it, or to the rest of the world."""
    one, two, good = bench.version("a", "b"), bench.version("a", "c"), bench.version("b", "c")
    digest = make_manifest({"layers.0": page("a")}).blobs[0].digest
    bench.store.faults = [Fault("wrong bytes", digest)]
    with pytest.raises(BlobCorrupt, match="another digest"):
        await bench.cache.acquire(one)
    bench.store.faults = []
    for _ in range(5):
        for version in (one, two):
            with pytest.raises(BlobCorrupt, match=f"{digest} came damaged twice"):
                await bench.cache.acquire(version)
    assert bench.store.count(digest) == 2
    assert bench.metric("quarantined_blobs") == bench.metric("quarantines_total") == 1
    assert bench.metric("open_breakers") == 0, "the reason is told as long as it holds"
    await bench.cache.acquire(good)
    bench.later_s += 1001
    assert as_bytes((await bench.cache.acquire(one)).blobs)["layers.0"] == page("a")
    assert bench.metric("quarantined_blobs") == 0


async def test_a_version_in_memory_does_not_mind_the_quarantine_of_another_size(bench: Bench) -> None:
    good = bench.version("a")
    manifest = make_manifest({"layers.0": page("a")})
    entry = manifest.blobs[0].model_copy(update={"size": manifest.blobs[0].size + 1})
    bad = put_manifest(bench.catalog, manifest.model_copy(update={"blobs": (entry,)}))
    for _ in range(2):
        with pytest.raises(BlobCorrupt):
            await bench.cache.acquire(bad)
    await bench.cache.acquire(good)


async def test_a_version_that_keeps_failing_is_answered_at_once_until_a_probe_succeeds(bench: Bench) -> None:
    bad, good = bench.version("a", "b"), bench.version("b", "c")
    digest = make_manifest({"layers.0": page("a")}).blobs[0].digest
    bench.store.faults = [Fault("unavailable", digest)]
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await bench.cache.acquire(bad)
    reads = bench.store.count(digest)
    bench.store.gate.clear()
    with pytest.raises(StoreUnavailable, match=r"does not answer.*failed 3 times in a row, next try in") as refused:
        await bench.cache.acquire(bad)
    assert refused.value.retry_after_s == pytest.approx(75, abs=26)
    bench.store.gate.set()
    assert bench.store.count(digest) == reads == 3
    assert bench.metric("open_breakers") == bench.metric("refusals_total") == 1
    await bench.cache.acquire(good)
    bench.store.faults = []
    bench.later_s += 101
    assert (await bench.cache.acquire(bad)).tier == "remote"
    assert bench.metric("open_breakers") == 0


async def test_one_failure_counts_once_however_many_wait(bench: Bench) -> None:
    version = bench.version("a")
    await bench.know(version)
    bench.store.gate.clear()
    bench.store.faults = [Fault("unavailable", "/blobs/", 1)]
    waiting = [await bench.start(version) for _ in range(9)]
    bench.store.gate.set()
    assert {type(one) for one in await asyncio.gather(*waiting, return_exceptions=True)} == {StoreUnavailable}
    assert (await bench.cache.acquire(version)).tier == "remote"


async def test_what_is_in_memory_is_served_though_its_breaker_is_open(bench: Bench) -> None:
    version, same = bench.version("a", "b"), bench.version("b", "a")
    bench.store.faults = [Fault("unavailable", "/blobs/")]
    for _ in range(4):
        with pytest.raises(StoreUnavailable):
            await bench.cache.acquire(version)
    bench.store.faults = []
    await bench.cache.acquire(same)
    assert bench.metric("open_breakers") == 1
    assert (await bench.cache.acquire(version)).tier == "host"


async def test_a_probe_that_leaves_lets_another_one_probe(bench: Bench) -> None:
    version = bench.version("a")
    bench.store.faults = [Fault("unavailable", "/blobs/", 3)]
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await bench.cache.acquire(version)
    bench.later_s += 101
    bench.store.gate.clear()
    probe = await bench.start(version)
    with pytest.raises(StoreUnavailable, match="3 times in a row"):
        await bench.cache.acquire(version)
    probe.cancel()
    await asyncio.sleep(0)
    another = await bench.start(version)
    bench.store.gate.set()
    await another


async def test_want_of_room_opens_no_breaker(bench: Bench) -> None:
    held, wanted = bench.version("a", pages=6), bench.version("b", pages=3)
    await bench.cache.acquire(held)
    for _ in range(4):
        with pytest.raises(StoreFull):
            await bench.cache.acquire(wanted)
    await bench.cache.release(held)
    await bench.cache.acquire(wanted)


async def test_bytes_on_disk_that_were_flipped_are_refused(bench: Bench, tmp_path: Path) -> None:
    version = bench.version("a")
    blob = next((tmp_path / BASE / "blobs").rglob("sha256/*"))
    damaged = bytearray(blob.read_bytes())
    damaged[100] ^= 4
    blob.write_bytes(damaged)
    with pytest.raises(BlobCorrupt):
        await bench.cache.acquire(version)
    assert bench.cache.versions == frozenset()
    assert bench.cache.stats().held_bytes == 0


async def test_nothing_is_visible_before_it_is_verified(bench: Bench) -> None:
    version = bench.version("a")
    await bench.know(version)
    bench.store.gate.clear()
    task = await bench.start(version)
    assert bench.cache.versions == frozenset()
    with pytest.raises(StoreError):
        bench.cache.offsets(version)
    bench.store.gate.set()
    await task
    assert bench.cache.versions == {version}


@pytest.mark.parametrize("match", ["/blobs/", "/versions/"])
async def test_a_store_that_is_down_passes_through_and_the_next_call_tries_again(bench: Bench, match: str) -> None:
    version = bench.version("a")
    bench.store.faults = [Fault("unavailable", match, 1)]
    with pytest.raises(StoreUnavailable):
        await bench.cache.acquire(version)
    bench.cache.check()
    assert (await bench.cache.acquire(version)).tier == "remote"


async def test_what_is_in_memory_is_served_while_the_store_is_down(bench: Bench) -> None:
    version = bench.version("a")
    await bench.cache.acquire(version)
    await bench.cache.release(version)
    bench.store.faults = [Fault("unavailable")]
    assert (await bench.cache.acquire(version)).tier == "host"


async def test_one_failed_blob_drops_the_fetches_that_have_not_begun(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fetch_threads=1)
    version = bench.version(*"abcdefgh")
    bench.store.faults = [Fault("unavailable", "/blobs/", 1)]
    bench.store.latency_s = 0.1
    with pytest.raises(StoreUnavailable):
        await bench.cache.acquire(version)
    await bench.cache.close()
    assert bench.store.count("/blobs/") == 2
    assert bench.cache.stats().held_bytes == 0
    bench.cache.check()


async def test_missing_and_malformed_versions_say_so(bench: Bench) -> None:
    with pytest.raises(ObjectNotFound):
        await bench.cache.acquire("0" * 64)
    with pytest.raises(InvalidName):
        await bench.cache.acquire("../x")
    version = bench.version("a")
    bench.store.faults = [Fault("truncated", "/versions/", 2)]  # damaged bytes are read once more
    with pytest.raises(ManifestInvalid):
        await bench.cache.acquire(version)
    manifest = make_manifest({"layers.0": page("a")})
    foreign = manifest.model_copy(update={"base": manifest.base.model_copy(update={"digest": "c" * 64})})
    with pytest.raises(BaseMismatch):
        await bench.cache.acquire(put_manifest(bench.catalog, foreign))


async def test_a_manifest_with_a_wrong_size_harms_only_itself(bench: Bench) -> None:
    good = bench.version("a")
    manifest = make_manifest({"layers.0": page("a")})
    entry = manifest.blobs[0].model_copy(update={"size": manifest.blobs[0].size - 1})
    bad = put_manifest(bench.catalog, manifest.model_copy(update={"blobs": (entry,)}))
    results = await asyncio.gather(bench.cache.acquire(bad), bench.cache.acquire(good), return_exceptions=True)
    assert isinstance(results[0], BlobCorrupt)
    assert not isinstance(results[1], BaseException)


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
    await until(lambda: bench.store.reading == 4)
    task.cancel()
    await asyncio.sleep(0)
    bench.cache.check()
    assert bench.cache.stats().blobs == 4, "one for each thread"
    bench.store.gate.set()
    await until(lambda: not bench.cache.stats().fetching)
    assert bench.store.count("/blobs/") == 4
    assert (bench.cache.stats().held_bytes, bench.cache.stats().cached_bytes) == (0, 4 * ALIGNMENT)


async def test_a_version_larger_than_the_arena_is_refused_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room_timeout_s=60)
    version = bench.version("a", pages=PAGES + 1)
    with pytest.raises(StoreFull, match="arena_bytes"):
        await bench.cache.acquire(version)
    await bench.cache.close()


async def test_an_arena_full_of_held_blobs_is_reported(bench: Bench) -> None:
    held, wanted, small = bench.version("a", pages=6), bench.version("b", pages=3), bench.version("c", pages=2)
    await bench.cache.acquire(held)
    with pytest.raises(StoreFull, match=f"{6 * ALIGNMENT} are held, for 1 versions"):
        await bench.cache.acquire(wanted)
    assert bench.metric("failures_total", error="StoreFull") == 1
    await bench.cache.acquire(small)
    await bench.cache.acquire(held)


async def test_a_refused_version_does_not_evict_what_cannot_help(bench: Bench) -> None:
    held, cached, wanted = bench.version("a", pages=6), bench.version("b"), bench.version("c", pages=3)
    for version in (held, cached):
        await bench.cache.acquire(version)
    await bench.cache.release(cached)
    with pytest.raises(StoreFull):
        await bench.cache.acquire(wanted)
    assert cached in bench.cache.versions


async def test_enough_bytes_in_pieces_that_are_too_small_is_no_room(bench: Bench) -> None:
    """Held pages 1, 3, 5 and 7 leave four single pages: no place for two in a row, and no book is left wrong."""
    versions = [bench.version(fill) for fill in "abcdefgh"]
    for version in versions:
        await bench.cache.acquire(version)
    for version in versions[::2]:
        await bench.cache.release(version)
    wide = put_version(bench.catalog, {"layers.0": page("w"), "layers.1": page("x", 2)})
    with pytest.raises(StoreFull):
        await bench.cache.acquire(wide)
    bench.cache.check()
    await bench.cache.release(versions[1])
    assert len((await bench.cache.acquire(wide)).blobs) == 2


@pytest.mark.parametrize("fills", [{"c": 1, "f": 1, "w": 6}, {"b": 1, "x": 2, "w": 5}])
async def test_a_version_is_not_kept_out_by_its_own_blobs_in_the_wrong_places(
    bench: Bench, fills: dict[str, int]
) -> None:
    """Pages a to h fill the arena. Those that the version shares leave no gap for w: they go and are fetched again.

    In the second case x finds a place beside b, which leaves no gap for w even when b is gone.
    """
    singles = [bench.version(fill) for fill in "abcdefgh"]
    for version in singles:
        await bench.cache.acquire(version)
    for version in singles:
        await bench.cache.release(version)
    blobs = {f"layers.{i}": page(fill, pages) for i, (fill, pages) in enumerate(fills.items())}
    wide = put_version(bench.catalog, blobs)
    assert as_bytes((await bench.cache.acquire(wide)).blobs) == blobs
    bench.cache.check()


async def test_versions_that_do_not_fit_together_load_one_after_the_other(tmp_path: Path) -> None:
    """Six versions of 3 pages in 8 pages, all at once: no deadlock, as nobody keeps a part while it waits."""
    bench = Bench(tmp_path, room_timeout_s=20)
    versions = [bench.version(*fills) for fills in ("abc", "def", "ghi", "jkl", "mno", "abx")]
    await bench.know(*versions)
    bench.store.latency_s = 0.005
    served: list[int] = []

    async def use(index: int) -> None:
        await bench.cache.acquire(versions[index])
        served.append(index)
        await asyncio.sleep(0.01)
        await bench.cache.release(versions[index])

    await asyncio.gather(*(use(index) for index in range(6)))
    assert sorted(served) == list(range(6))
    assert sorted(served[:2]) == [0, 1], "first come, first served"
    await bench.cache.close()
    bench.cache.check()


async def test_those_who_wait_for_room_hold_nothing_and_are_passed_by_what_is_here(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room_timeout_s=20)
    held, large, later = bench.version("a", pages=6), bench.version("b", pages=5), bench.version("c", pages=1)
    await bench.know(large, later)
    await bench.cache.acquire(held)
    waiting = [await bench.start(large), await bench.start(later)]
    assert bench.cache.stats().held_bytes == 6 * ALIGNMENT
    assert (await bench.cache.acquire(held)).tier == "host"
    assert not waiting[1].done(), "it came later, so it waits though it would fit"
    waiting[0].cancel()
    await waiting[1]
    await bench.cache.close()


async def test_room_of_an_abandoned_fetch_can_be_had_when_it_ends(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room_timeout_s=20)
    abandoned, wanted = bench.version("a", pages=6), bench.version("b", pages=3)
    await bench.know(abandoned, wanted)
    bench.store.gate.clear()
    first = await bench.start(abandoned)
    await until(lambda: bench.store.reading == 1)
    first.cancel()
    second = await bench.start(wanted)
    assert bench.store.count("/blobs/") == 1, "a thread still writes there"
    bench.store.gate.set()
    async with asyncio.timeout(5):
        await second
    await bench.cache.close()


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


async def test_close_answers_who_waits_for_room_when_nothing_moves(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room_timeout_s=60)
    held, wanted = bench.version("a", pages=6), bench.version("b", pages=3)
    await bench.know(wanted)
    await bench.cache.acquire(held)
    waiting = await bench.start(wanted)
    await bench.cache.close()
    async with asyncio.timeout(5):
        with pytest.raises(StoreUnavailable):
            await waiting


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
