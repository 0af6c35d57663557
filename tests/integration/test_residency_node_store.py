"""The node store on a real Ray: killed in the middle, it comes back with what it had on disk."""

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from deltazip_deployments.node_store.discovery import find_or_start, kill_stores, node_store_client
from deltazip_deployments.serving import connect
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.manifest import BlobEntry
from deltazip_ray.config import AppConfig, NodeStoreConfig, StoreConfig
from deltazip_ray.residency.tiers import HostDelta
from tests.support.catalogs import BASE_DIGEST, publish
from tests.support.serve_app import private_ray, wait_until

APP = "killed"


@pytest.fixture
def config(tmp_path: Path) -> Iterator[AppConfig]:
    """Settings of an application with a disk tier, on a Ray of its own."""
    node_store = NodeStoreConfig(arena_bytes=4 << 20, disk_dir=tmp_path / "disk", disk_bytes=8 << 20)
    store = StoreConfig(url=(tmp_path / "store").as_uri())
    config = AppConfig(base="/unused", store=store, node_store=node_store)
    with private_ray():
        connect(config)
        yield config
        kill_stores(APP)
        ray.shutdown()


def is_sound(delta: HostDelta) -> bool:
    def fits(entry: BlobEntry) -> bool:
        return sha256_hex(delta.blobs[entry.block]) == entry.digest

    return all(fits(entry) for entry in delta.manifest.blobs)


async def test_a_killed_node_store_has_its_deltas_again_though_the_store_is_gone(
    config: AppConfig, tmp_path: Path
) -> None:
    version = publish(config.store, tmp_path, "one", size=5000)
    client = node_store_client(APP, "replica", config, lambda: BASE_DIGEST)
    before = await client.acquire(version)
    assert before.tier == "remote"
    await asyncio.to_thread(wait_until, lambda: len(list((tmp_path / "disk").glob("*-*"))) == 3)
    shutil.rmtree(tmp_path / "store")
    arena = await find_or_start(APP, config, BASE_DIGEST).arena.remote()
    os.kill(arena.pid, signal.SIGKILL)
    after = await client.acquire(version)
    assert after.tier == "disk"
    assert is_sound(before), "what was mapped before stays"
    assert is_sound(after)
    await client.release(version)
    await client.leave()
