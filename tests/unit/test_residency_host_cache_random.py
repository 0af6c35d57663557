"""Random acquires, releases, cancellations and faults of store and disk: whoever gets a version gets its bytes."""

import asyncio
import random
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.object_store import Pieces
from deltazip_ray.config import MIB, BreakerConfig, NodeStoreConfig
from deltazip_ray.errors import BlobCorrupt, StoreFull, StoreUnavailable
from deltazip_ray.residency.arena import ALIGNMENT
from deltazip_ray.residency.host_cache import HostCache
from tests.support.faulty_store import Fault, FaultyStore
from tests.support.plain_versions import BASE, put_version

PAGES = 12


class Mischief(FaultyStore):
    """Decides about faults by chance; on average one read in eight goes wrong."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        super().__init__(root)
        self.rng = rng
        self.active = True

    def pieces(self, key: str, buffer: memoryview) -> Pieces:
        if self.active and self.rng.random() < 0.12:
            kind = self.rng.choice(["unavailable", "wrong bytes", "truncated"])
            self.faults.append(Fault(kind, key, 1))  # type: ignore[arg-type]
        self.latency_s = self.rng.choice([0.0, 0.0, 0.002])
        return super().pieces(key, buffer)


def make_versions(rng: random.Random, catalog: Catalog) -> dict[str, dict[str, bytes]]:
    """Versions of one to four blobs out of a few, so that many are shared; none is larger than the arena."""
    pool = [bytes([65 + i]) * rng.randint(1, 3 * ALIGNMENT) for i in range(10)]
    made: dict[str, dict[str, bytes]] = {}
    for _ in range(8):
        blobs = {f"layers.{i}": blob for i, blob in enumerate(rng.sample(pool, rng.randint(1, 4)))}
        made[put_version(catalog, blobs)] = blobs
    return made


async def client(rng: random.Random, cache: HostCache, version: str, blobs: dict[str, bytes]) -> str:
    try:
        delta = await cache.acquire(version)
    except (BlobCorrupt, StoreUnavailable, StoreFull) as error:
        return type(error).__name__
    try:
        assert {block: bytes(view) for block, view in delta.blobs.items()} == blobs
        await asyncio.sleep(rng.choice([0.0, 0.001, 0.003]))
        assert {block: bytes(view) for block, view in delta.blobs.items()} == blobs, "overwritten while it was held"
    finally:
        await cache.release(version)
    return "served"


def damage(rng: random.Random, folder: Path) -> None:
    """Something happens to a file of the disk tier."""
    files = sorted(path for path in folder.glob("*-*"))
    if files:
        file = rng.choice(files)
        try:
            match rng.choice(["gone", "short", "wrong"]):
                case "gone":
                    file.unlink()
                case "short":
                    file.write_bytes(file.read_bytes()[:-1])
                case "wrong":
                    file.write_bytes(bytes(file.stat().st_size))
        except FileNotFoundError:
            return  # evicted meanwhile


@pytest.mark.parametrize("disk", [False, True], ids=["no disk", "disk"])
@pytest.mark.parametrize("seed", range(6))
async def test_whoever_gets_a_version_gets_its_bytes(seed: int, disk: bool, tmp_path: Path) -> None:
    rng = random.Random(seed)
    store = Mischief(tmp_path / "store", rng)
    catalog = Catalog(store, BASE)
    versions = make_versions(rng, catalog)
    settings = NodeStoreConfig(
        fetch_threads=3,
        room_timeout_s=0.2,
        breaker=BreakerConfig(failures=2, backoff_s=0.005, backoff_max_s=0.02),
        quarantine_s=0.005,
        disk_dir=tmp_path / "disk" if disk else None,
        disk_bytes=MIB,
    )
    later_s = 0.0
    clock = lambda: time.monotonic() + later_s  # noqa: E731
    cache = HostCache(catalog, bytearray(PAGES * ALIGNMENT), settings, CollectorRegistry(), clock)
    tasks: list[asyncio.Task[str]] = []
    for _ in range(150):
        version = rng.choice(list(versions))
        tasks.append(asyncio.create_task(client(rng, cache, version, versions[version])))
        if rng.random() < 0.2:
            rng.choice(tasks).cancel()
        if rng.random() < 0.1:
            damage(rng, tmp_path / "disk")
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0.0005)
            cache.check()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    ends = [result if isinstance(result, str) else type(result).__name__ for result in results]
    assert set(ends) <= {"served", "BlobCorrupt", "StoreUnavailable", "StoreFull", "CancelledError"}
    assert ends.count("served") > 40
    store.active = False
    store.faults = []
    later_s = 1.0
    for version, blobs in versions.items():
        for other in versions:
            await cache.discard(other)  # what is in memory is served whatever its breaker says, and leaves it so
        assert await client(rng, cache, version, blobs) == "served", "no failure is remembered for ever"
    assert (cache.stats().open_breakers, cache.stats().quarantined) == (0, 0)
    await cache.close()
    cache.check()
    assert cache.stats().held_bytes == 0, "nothing leaks"
