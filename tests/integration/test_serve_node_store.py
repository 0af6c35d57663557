"""The node store without Ray: leases on a real host cache over a real catalog."""

import hashlib
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deltazip_deployments.node_store.actor import NodeStore
from deltazip_deployments.node_store.arena import Arena, map_arena
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import MIB, NodeStoreConfig, StoreConfig
from deltazip_ray.errors import ObjectNotFound
from deltazip_ray.residency.host_cache import HostCache
from tests.support.catalogs import BASE_DIGEST, publish


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def versions(tmp_path: Path) -> list[str]:
    (tmp_path / "store").mkdir()
    return [publish(config(tmp_path), tmp_path, f"v{i}", seed=i, size=60_000) for i in range(3)]


def config(folder: Path) -> StoreConfig:
    return StoreConfig(url=(folder / "store").as_uri())


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> NodeStore:
    """Room for two versions of 480 kB."""
    settings = NodeStoreConfig(arena_bytes=MIB, room_timeout_s=0.2)
    registry = CollectorRegistry()
    arena = Arena(tmp_path, settings.arena_bytes)
    cache = HostCache(Catalog(open_store(config(tmp_path)), BASE_DIGEST), arena.buffer, settings, registry)
    return NodeStore("n1", cache, arena, 10.0, registry, clock)


async def test_replicas_read_verified_bytes_out_of_the_arena(store: NodeStore, versions: list[str]) -> None:
    mapped = map_arena(await store.arena())
    held = await store.acquire("a", versions[0])
    assert held.tier == "remote"
    for blob in held.manifest.blobs:
        offset, size = held.blobs[blob.block]
        assert hashlib.sha256(mapped[offset : offset + size]).hexdigest() == blob.digest
    assert (await store.acquire("b", versions[0])).tier == "host"
    assert await store.heartbeat("b", "") == {versions[0]}


async def test_what_a_silent_replica_holds_is_freed(store: NodeStore, versions: list[str], clock: Clock) -> None:
    await store.acquire("dead", versions[0])
    await store.acquire("dead", versions[1])
    clock.now = 9.0
    await store.heartbeat("alive", "metrics of the living")
    assert await store.drop_silent() == 0.0
    clock.now = 12.0
    assert await store.drop_silent() == 0.0
    # Both rooms can be had now, and what comes late from the dead is not taken for the living.
    assert not await store.release("dead", versions[0])
    for version in versions[1:]:
        await store.acquire("alive", version)
        assert await store.release("alive", version)
    # The last sign of life was at 12.
    clock.now = 30.0
    assert await store.drop_silent() == 18.0
    clock.now = 35.0
    assert await store.drop_silent() == 23.0


async def test_a_report_has_the_metrics_of_the_present(store: NodeStore, versions: list[str]) -> None:
    await store.heartbeat("a", "x 1\n")
    await store.heartbeat("b", "x 2\n")
    await store.acquire("a", versions[0])
    await store.leave("b")
    report = await store.report()
    assert report.node == "n1"
    assert report.replicas == {"a": "x 1\n"}
    assert 'deltazip_host_acquires_total{tier="remote"} 1.0' in report.store


async def test_an_unknown_version_leaves_no_hold(store: NodeStore, versions: list[str]) -> None:
    with pytest.raises(ObjectNotFound):
        await store.acquire("a", "0" * 64)
    await store.leave("a")
