"""The host tier when its arena is full: who leaves, who waits, and who is told."""

import asyncio
from pathlib import Path

import pytest

from deltazip_ray.errors import (
    StoreFull,
    StoreUnavailable,
)
from deltazip_ray.residency.arena import ALIGNMENT
from tests.support.host_bench import PAGES, Bench, as_bytes, page
from tests.support.plain_versions import put_version
from tests.support.waiting import until


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


async def test_a_version_larger_than_the_arena_is_refused_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room_timeout_s=60)
    version = bench.version("a", pages=PAGES + 1)
    with pytest.raises(StoreFull, match="arena_bytes"):
        await bench.cache.acquire(version)
    await bench.cache.close()


async def test_an_arena_full_of_held_blobs_is_reported(bench: Bench) -> None:
    held, wanted, small = bench.version("a", pages=6), bench.version("b", pages=3), bench.version("c", pages=2)
    await bench.cache.acquire(held)
    with pytest.raises(StoreFull, match=f"1 versions hold {6 * ALIGNMENT} of"):
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
