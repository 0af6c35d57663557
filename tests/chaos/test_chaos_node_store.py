"""A node store that was stopped, or kept busy, for longer than leases last: its replicas are still there."""

import asyncio
import time
from pathlib import Path

from deltazip_deployments.node_store.actor import NodeStoreProcess
from deltazip_ray.config import MIB, NodeStoreConfig, StoreConfig
from tests.support.catalogs import BASE_DIGEST, publish

LEASE_S = 0.2


async def test_a_store_that_was_stopped_does_not_take_its_replicas_for_gone(tmp_path: Path) -> None:
    config = StoreConfig(url=(tmp_path / "store").as_uri())
    version = await asyncio.to_thread(publish, config, tmp_path, "v")
    settings = NodeStoreConfig(arena_bytes=MIB, shm_dir=tmp_path, lease_timeout_s=LEASE_S)
    store = NodeStoreProcess("node", config, settings, BASE_DIGEST)
    await store.acquire("replica", version)
    time.sleep(6 * LEASE_S)  # noqa: ASYNC251 - so does SIGSTOP, and a machine that moves
    await asyncio.sleep(LEASE_S / 3)
    await store.heartbeat("replica", "")
    assert await store.release("replica", version), "its hold was dropped"
    await store.acquire("silent", version)
    for _ in range(100):
        await asyncio.sleep(LEASE_S / 2)
        await store.heartbeat("replica", "")
        if "silent" not in store._leases.replicas:
            break
    assert not await store.release("silent", version), "who shows no life still loses its holds"
    for task in store._tasks:
        assert not task.done()
        task.cancel()
