"""The disk tier under the host tier: hits, healing, and a disk that is slow, full or unusable."""

import asyncio
import errno
import resource
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.config import MIB, NodeStoreConfig
from deltazip_ray.errors import BlobCorrupt, StoreUnavailable
from deltazip_ray.observability.disk_metrics import DiskMetrics, DiskStats
from deltazip_ray.residency.arena import ALIGNMENT
from deltazip_ray.residency.disk_folder import DiskFolder
from deltazip_ray.residency.disk_tier import DiskTier
from deltazip_ray.residency.host_cache import HostCache
from deltazip_ray.residency.quarantine import BlobKey, blob_key
from tests.support.faulty_store import Fault, FaultyStore
from tests.support.plain_versions import BASE, make_manifest, put_version
from tests.support.waiting import until


def page(fill: str, pages: int = 1) -> bytes:
    return fill.encode() * (pages * ALIGNMENT - 7)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Life:
    """One life of a host's store: an empty arena over a store and a folder that outlive it."""

    def __init__(self, store: FaultyStore, folder: Path | None, pages: int = 8) -> None:
        self.store = store
        self.folder = folder
        self.catalog = Catalog(store, BASE)
        self.registry = CollectorRegistry()
        self.later_s = 0.0
        settings = NodeStoreConfig(disk_dir=folder, disk_bytes=64 * MIB, room_timeout_s=5)
        clock = lambda: time.monotonic() + self.later_s  # noqa: E731
        self.cache = HostCache(self.catalog, bytearray(pages * ALIGNMENT), settings, self.registry, clock)

    def version(self, *blobs: bytes) -> str:
        return put_version(self.catalog, {f"layers.{i}": data for i, data in enumerate(blobs)})

    async def tier(self, version: str) -> str:
        """Where the version is; it is let go at once."""
        delta = await self.cache.acquire(version)
        await self.cache.release(version)
        for entry in delta.manifest.blobs:
            assert make_manifest({"outer": bytes(delta.blobs[entry.block])}).blobs[0].digest == entry.digest
        return delta.tier

    async def kept(self, blobs: int, versions: int = 1) -> None:
        await until(lambda: self.metric("files") == blobs + versions)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"deltazip_disk_{name}", labels) or 0.0

    def host_metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"deltazip_host_{name}", labels) or 0.0

    def file(self, data: bytes) -> Path:
        assert self.folder is not None
        entry = make_manifest({"outer": data}).blobs[0]
        return self.folder / f"{entry.digest}-{entry.size}"


@pytest.fixture
async def begin(tmp_path: Path) -> AsyncIterator[Callable[..., Life]]:
    """Begins a life; all of them end with the test."""
    lives: list[Life] = []
    store = FaultyStore(tmp_path / "store")

    def begin(**changes: int) -> Life:
        lives.append(Life(store, tmp_path / "disk", **changes))
        return lives[-1]

    yield begin
    for life in lives:
        await life.cache.close()
        life.cache.check()


async def restarted(life: Life, begin: Callable[..., Life]) -> Life:
    await life.cache.close()
    life.store.reads = []
    return begin()


async def test_what_was_fetched_survives_a_restart(begin: Callable[..., Life]) -> None:
    first = begin()
    version = first.version(page("a"), page("b"))
    assert await first.tier(version) == "remote"
    await first.kept(2)
    assert first.metric("bytes") == 2 * len(page("a")) + len(first.catalog.manifest(version).canonical())
    second = await restarted(first, begin)
    second.store.faults = [Fault("unavailable")]
    assert [await second.tier(version) for _ in range(2)] == ["disk", "host"]
    assert second.store.reads == []
    assert second.host_metric("acquires_total", tier="disk") == 1
    assert second.host_metric("fetch_seconds_count", tier="disk") == 2
    assert second.host_metric("fetched_bytes_total", tier="remote") == 0


async def test_what_is_on_disk_waits_for_no_read_of_a_store_that_hangs(begin: Callable[..., Life]) -> None:
    first = begin()
    version = first.version(page("a"))
    await first.tier(version)
    await first.kept(1)
    life = await restarted(first, lambda: begin(pages=100))
    threads = 16
    large = [life.version(*(bytes([65 + i, 65 + n]) for i in range(threads))) for n in range(3)]
    life.store.faults = [Fault("unavailable", "/blobs/")]
    for one in large:  # whose manifests are known then
        with pytest.raises(StoreUnavailable):
            await life.cache.acquire(one)
    await until(lambda: not life.cache.stats().fetching)
    life.store.faults = []
    life.store.gate.clear()
    unknown = [life.version(bytes([n])) for n in range(40)]
    waiting = [asyncio.create_task(life.cache.acquire(one)) for one in (*large, *unknown)]
    await until(lambda: life.store.reading == 2 * threads)
    async with asyncio.timeout(5):
        assert await life.tier(version) == "disk"
    assert not any(task.done() for task in waiting)
    life.store.gate.set()
    await asyncio.gather(*waiting)


async def test_what_left_the_arena_is_on_disk(begin: Callable[..., Life]) -> None:
    life = begin(pages=2)
    versions = [life.version(page(fill, 2)) for fill in "abc"]
    for count, version in enumerate(versions, 1):
        await life.tier(version)
        await life.kept(count, versions=count)  # before the next one takes its room, or it would not be written
    assert [await life.tier(version) for version in versions] == ["disk"] * 3


async def test_the_slowest_blob_gives_the_tier(begin: Callable[..., Life]) -> None:
    first = begin()
    await first.tier(first.version(page("a")))
    await first.kept(1)
    second = await restarted(first, begin)
    assert await second.tier(second.version(page("a"), page("b"))) == "remote"
    await second.tier(second.version(page("c")))
    assert second.store.count("/blobs/") == 2


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "empty", "gone"])
@pytest.mark.parametrize("when", ["after a restart", "meanwhile"])
async def test_a_damaged_file_is_fetched_again(begin: Callable[..., Life], damage: str, when: str) -> None:
    life = begin(pages=2)
    version, other = life.version(page("a")), life.version(page("b", 2))
    await life.tier(version)
    await life.kept(1)
    if when == "after a restart":
        life = await restarted(life, begin)
    else:
        await life.tier(other)
        await life.kept(2, versions=2)
    good = life.file(page("a")).read_bytes()
    if damage == "gone":
        life.file(page("a")).unlink()
    else:
        bad = {"flipped": good[:9] + b"?" + good[10:], "truncated": good[:-1], "longer": good + b"a", "empty": b""}
        life.file(page("a")).write_bytes(bad[damage])
    assert await life.tier(version) == "remote"
    await until(lambda: life.file(page("a")).exists() and life.file(page("a")).read_bytes() == good)
    found_when_read = damage == "flipped" or (when == "meanwhile" and damage != "gone")
    assert life.metric("damaged_total") == found_when_read


async def test_damage_of_disk_and_store_is_told(begin: Callable[..., Life]) -> None:
    first = begin()
    version = first.version(page("a"))
    await first.tier(version)
    await first.kept(1)
    first.file(page("a")).write_bytes(page("b"))
    second = await restarted(first, begin)
    second.store.faults = [Fault("wrong bytes", "/blobs/")]
    with pytest.raises(BlobCorrupt):
        await second.tier(version)
    assert second.metric("damaged_total") == 1
    assert not second.file(page("a")).exists()


async def test_without_a_folder_there_is_no_tier(tmp_path: Path) -> None:
    life = Life(FaultyStore(tmp_path / "store"), None)
    await life.tier(life.version(page("a")))
    await life.cache.close()
    assert life.registry.get_sample_value("deltazip_disk_bytes") is None
    assert names(tmp_path) == {"store"}


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writes wait for this event."""
    gate = threading.Event()
    write = DiskFolder.write

    def slow(folder: DiskFolder, key: BlobKey, chunks: Iterable[bytes]) -> bool:
        assert gate.wait(20)
        return write(folder, key, chunks)

    monkeypatch.setattr(DiskFolder, "write", slow)
    yield gate
    gate.set()


async def test_a_slow_disk_delays_nobody_and_holds_no_room(
    begin: Callable[..., Life], slow_disk: threading.Event
) -> None:
    life = begin(pages=2)
    versions = [life.version(page(fill, 2)) for fill in "abc"]
    async with asyncio.timeout(5):
        assert [await life.tier(version) for version in versions] == ["remote"] * 3
    assert life.cache.stats().cached_bytes == 2 * ALIGNMENT
    slow_disk.set()
    await until(lambda: life.metric("skipped_total") == 2)
    await life.kept(1, versions=3)
    assert life.file(page("c", 2)).read_bytes() == page("c", 2), "a and b were overwritten before they were written"


async def test_only_so_many_wait_for_a_slow_disk(slow_disk: threading.Event, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    tier = DiskTier(DiskFolder(tmp_path, MIB), DiskMetrics(registry, lambda: DiskStats(0, 0, 0)))
    entry = make_manifest({"outer": page("a")}).blobs[0]
    for _ in range(70):
        tier.offer(blob_key(entry), memoryview(page("a")))
    assert registry.get_sample_value("deltazip_disk_skipped_total") == 6
    slow_disk.set()
    tier.close()


@contextmanager
def no_room_for(size: int) -> Iterator[None]:
    """Files may not grow to ``size``: the disk refuses writes as a full one does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_costs_the_caching_and_one_line_in_the_log(
    begin: Callable[..., Life], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    life = begin(pages=2048)
    large = [fill * (2 * MIB) for fill in (b"a", b"b", b"c", b"d", b"e")]
    versions = [life.version(data) for data in large]
    with no_room_for(2 * MIB):
        for failures, version in enumerate(versions[:3], start=1):
            assert await life.tier(version) == "remote"
            await until(lambda failures=failures: life.metric("failures_total", operation="write") == failures)
            life.later_s += 31
        life.later_s -= 31
        assert await life.tier(versions[3]) == "remote", "during the pause nothing is tried"
    assert life.metric("skipped_total") == 2, "the blob and its manifest"
    (line,) = [record.message for record in caplog.records if "deltazip" in record.name]
    assert "failed to write" in line
    assert "node_store.disk_dir" in line
    assert all(path.stat().st_size < 1000 for path in (tmp_path / "disk").iterdir()), "manifests find room"
    life.later_s += 31
    await life.tier(versions[4])
    await life.kept(1, versions=4)


async def test_a_folder_that_cannot_be_used_fails_no_request(
    begin: Callable[..., Life], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "disk").write_text("a file is in the way")
    life = begin()
    versions = [life.version(page(fill)) for fill in "ab"]
    assert [await life.tier(version) for version in versions] == ["remote"] * 2
    assert life.metric("failures_total", operation="read") == 4, "two manifests and two blobs"
    assert len([record for record in caplog.records if "deltazip" in record.name]) == 1


async def test_while_another_process_has_the_folder_requests_go_on_without_it(
    begin: Callable[..., Life], caplog: pytest.LogCaptureFixture
) -> None:
    old, new = begin(), begin()
    version = old.version(page("a"))
    await old.tier(version)
    await old.kept(1)
    assert await new.tier(version) == "remote"
    assert "another process uses the folder" in caplog.text
    await old.cache.close()
    new.later_s += 31
    again = new.version(page("b"))
    await new.tier(again)
    await new.kept(2, versions=2)


async def test_a_disk_error_has_a_name_in_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a sector that cannot be read: the blob is fetched, and the file is not asked again."""
    registry = CollectorRegistry()
    folder = DiskFolder(tmp_path, MIB)
    tier = DiskTier(folder, DiskMetrics(registry, lambda: DiskStats(0, 0, 0)))
    entry = make_manifest({"outer": page("a")}).blobs[0]
    tier.offer(blob_key(entry), memoryview(page("a")))
    await until(lambda: len(folder) == 1)

    def broken(*_: object) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folder, "read_into", broken)
    assert not tier.read(blob_key(entry), memoryview(bytearray(entry.size)))
    assert registry.get_sample_value("deltazip_disk_failures_total", {"operation": "read"}) == 1
    assert len(folder) == 0
    tier.close()
