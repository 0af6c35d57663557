"""The replica's side of the node store: its death, lost leases, and callers that leave. Real stores, no Ray between."""

import asyncio
import hashlib
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from ray.exceptions import ActorDiedError, ActorUnavailableError

from deltazip_deployments.node_store.actor import NodeStore
from deltazip_deployments.node_store.arena import Arena
from deltazip_deployments.node_store.client import NodeStoreClient
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import MIB, NodeStoreConfig, StoreConfig
from deltazip_ray.errors import StoreUnavailable
from deltazip_ray.residency.host_cache import HostCache
from deltazip_ray.residency.tiers import HostDelta
from tests.support.catalogs import BASE_DIGEST, publish


class Handle:
    """What an actor's handle is to its caller: ``handle.method.remote(…)``, until the actor is dead."""

    def __init__(self, store: NodeStore) -> None:
        self.store = store
        self.alive = True
        self.lost_calls = 0

    def __getattr__(self, method: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> Awaitable[Any]:
                return asyncio.ensure_future(self._call(getattr(self.store, method), *args))

        return Method

    async def _call(self, method: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        if not self.alive:
            raise ActorDiedError
        if self.lost_calls:
            self.lost_calls -= 1
            raise ActorUnavailableError("a network between", None)
        return await method(*args)


class Host:
    """Starts node stores as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lives: list[Handle] = []
        self.broken = False
        self.memory: Callable[[], object] = lambda: None
        """Of an earlier life, which leaves no room for another one as long as somebody has it."""

    def find(self) -> Handle:
        if self.broken:
            raise StoreUnavailable("no memory left on this host")
        if not self.lives or not self.lives[-1].alive:
            if self.memory() is not None:
                raise ActorDiedError
            registry = CollectorRegistry()
            settings = NodeStoreConfig(arena_bytes=MIB)
            catalog = Catalog(open_store(StoreConfig(url=(self.folder / "store").as_uri())), BASE_DIGEST)
            arena = Arena(self.folder, settings.arena_bytes)
            cache = HostCache(catalog, arena.buffer, settings, registry)
            self.lives.append(Handle(NodeStore("n1", cache, arena, 10.0, registry)))
        return self.lives[-1]


def is_whole(delta: HostDelta) -> bool:
    return all(hashlib.sha256(delta.blobs[blob.block]).hexdigest() == blob.digest for blob in delta.manifest.blobs)


@pytest.fixture
def versions(tmp_path: Path) -> list[str]:
    (tmp_path / "store").mkdir()
    store = StoreConfig(url=(tmp_path / "store").as_uri())
    return [publish(store, tmp_path, f"v{i}", seed=i, size=60_000) for i in range(2)]


@pytest.fixture
def host(tmp_path: Path, versions: list[str]) -> Host:
    return Host(tmp_path)


@pytest.fixture
async def client(host: Host) -> AsyncIterator[NodeStoreClient]:
    client = NodeStoreClient("r1", host.find)
    await client.connect()
    yield client
    await client.leave()


async def test_deltas_are_views_of_the_stores_memory(client: NodeStoreClient, versions: list[str]) -> None:
    delta = await client.acquire(versions[0])
    assert is_whole(delta)
    assert delta.tier == "remote"
    assert all(view.readonly for view in delta.blobs.values())
    await client.release(versions[0])
    assert (await client.acquire(versions[0])).tier == "host"
    assert await client.heartbeat("m") == {versions[0]}


async def test_a_store_that_died_is_replaced_and_its_memory_stays(
    client: NodeStoreClient, host: Host, versions: list[str]
) -> None:
    old = await client.acquire(versions[0])
    host.lives[0].alive = False
    new = await client.acquire(versions[1])
    assert len(host.lives) == 2
    assert is_whole(old)
    assert is_whole(new)
    # What the old one had lent is given back to nobody; what the new one has lent is given back to it.
    await client.release(versions[0])
    await client.release(versions[1])
    assert await client.heartbeat("") == {versions[1]}
    assert await host.lives[1].store.drop_silent() == 0.0


async def test_the_memory_of_a_store_that_died_makes_room_for_the_next_one(
    client: NodeStoreClient, host: Host, versions: list[str]
) -> None:
    delta = await client.acquire(versions[0])
    await client.release(versions[0])
    host.memory = weakref.ref(delta.memory)  # type: ignore[arg-type]
    del delta
    host.lives[0].alive = False
    assert is_whole(await client.acquire(versions[1]))


async def test_a_store_that_was_out_of_reach_keeps_its_memory_and_takes_its_holds_back(
    client: NodeStoreClient, host: Host, versions: list[str]
) -> None:
    delta = await client.acquire(versions[0])
    host.lives[0].lost_calls = 1
    assert await client.heartbeat("") == {versions[0]}
    assert (await client.connect()) is delta.memory, "another mapping would have to be page-locked again"
    await client.release(versions[0])
    assert 'state="held"} 0.0' in (await host.lives[0].store.report()).store


@pytest.mark.parametrize("noticed", [False, True])
async def test_a_hold_is_given_back_to_a_store_that_is_out_of_reach_just_then(
    client: NodeStoreClient, host: Host, versions: list[str], noticed: bool
) -> None:
    await client.acquire(versions[0])
    beat = asyncio.create_task(client.heartbeat("")) if noticed else None
    host.lives[0].lost_calls = 1
    await asyncio.sleep(0.05)
    await client.release(versions[0])
    if beat is not None:
        await beat
    assert 'state="held"} 0.0' in (await host.lives[0].store.report()).store


async def test_of_two_lives_the_living_ones_hold_is_kept_to_the_end(
    client: NodeStoreClient, host: Host, versions: list[str]
) -> None:
    await client.acquire(versions[0])
    host.lives[0].alive = False
    await client.acquire(versions[0])

    async def held() -> bool:
        return 'state="held"} 0.0' not in (await host.lives[1].store.report()).store

    assert await held()
    await client.release(versions[0])
    assert await held(), "either of the two may be the one that still reads"
    await client.release(versions[0])
    assert not await held()


async def test_many_callers_make_one_new_connection(client: NodeStoreClient, host: Host, versions: list[str]) -> None:
    host.lives[0].alive = False
    deltas = await asyncio.gather(*(client.acquire(version) for version in versions * 3))
    assert len(host.lives) == 2
    assert all(is_whole(delta) for delta in deltas)


async def test_a_host_without_a_store_is_unavailable(
    host: Host, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltazip_deployments.node_store.client._PATIENCE_S", 0.3)
    host.broken = True
    client = NodeStoreClient("r1", host.find)
    with pytest.raises(StoreUnavailable, match="no memory left"):
        await client.acquire(versions[0])


async def test_bytes_whose_hold_was_dropped_are_not_trusted(
    client: NodeStoreClient, host: Host, versions: list[str]
) -> None:
    await client.acquire(versions[0])
    await host.lives[0].store.leave("r1")
    with pytest.raises(StoreUnavailable, match="dropped its lease"):
        await client.release(versions[0])


async def test_a_caller_that_leaves_leaves_no_hold(client: NodeStoreClient, host: Host, versions: list[str]) -> None:
    store = host.lives[0].store
    call = asyncio.create_task(client.acquire(versions[0]))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    for _ in range(200):
        held = 'state="held"} 0.0' in (await store.report()).store
        if held and await client.heartbeat("") == {versions[0]}:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the version is still held")
