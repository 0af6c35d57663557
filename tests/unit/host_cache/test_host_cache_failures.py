"""The host tier over a store that is damaged, away or wrong."""

import asyncio
from pathlib import Path

import pytest

from deltazip_ray.errors import (
    BaseMismatch,
    BlobCorrupt,
    InvalidName,
    ManifestInvalid,
    ObjectNotFound,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from tests.support.faulty_store import Fault
from tests.support.host_bench import Bench, as_bytes, page
from tests.support.plain_versions import BASE, make_manifest, put_manifest
from tests.support.waiting import until


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
    with pytest.raises(BlobCorrupt, match="do not match its digest"):
        await bench.cache.acquire(one)
    bench.store.faults = []
    for _ in range(5):
        for version in (one, two):
            with pytest.raises(BlobCorrupt, match=f"{digest} arrived damaged twice"):
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
    await until(lambda: not bench.cache.stats().fetching)
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


async def test_a_hint_that_finds_no_room_closes_no_breaker(bench: Bench) -> None:
    held, version = bench.version("a", pages=6), bench.version("b", pages=3)
    bench.store.faults = [Fault("unavailable", "/blobs/", 3)]
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await bench.cache.acquire(version)
    await bench.cache.acquire(held)
    bench.later_s += 101
    assert not await bench.cache.prefetch(version)
    assert bench.metric("open_breakers") == 1, "nothing was tried"


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
