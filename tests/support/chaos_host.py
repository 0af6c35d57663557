"""Host tier, slots and a store that goes wrong, together, for tests that play with them in any order."""

import asyncio
import contextlib
import functools
import random
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.config import MIB, BreakerConfig, NodeStoreConfig
from deltazip_ray.engine.versions import Versions
from deltazip_ray.errors import DeltaZipError
from deltazip_ray.observability.engine_metrics import EngineMetrics, EngineStats
from deltazip_ray.residency.arena import ALIGNMENT
from deltazip_ray.residency.host_cache import HostCache
from deltazip_ray.residency.slot_entries import Pin
from deltazip_ray.residency.tiers import HostDelta
from tests.support.faulty_store import FaultyStore
from tests.support.plain_versions import BASE, make_manifest, put_version

ARENA_PAGES = 12
SLOTS = 3
LOAD_TIMEOUT_S = 3.0

Blobs = Mapping[str, bytes]
"""A version's contents, by block."""


class ByteSlots:
    """Slots that hold the bytes of versions, as DeviceSlots holds their tensors; copies take a moment."""

    def __init__(self, count: int, truth: Mapping[str, Blobs]) -> None:
        self.contents: list[Blobs | None] = [None] * count
        self._truth = truth
        self.writing = [threading.Lock() for _ in range(count)]
        """Who has one may write to that slot."""

    def check(self, manifest: Manifest) -> None:
        """All fit."""

    def vocab_size(self, slot: int) -> int:
        return 1

    def load(self, slot: int, delta: HostDelta, usable: Callable[[], object]) -> None:
        if not self.writing[slot].acquire(blocking=False):
            raise AssertionError(f"two loads write to slot {slot}")
        try:
            self.contents[slot] = None
            if random.random() < 0.5:
                usable()
            time.sleep(random.choice((0.0, 0.0005)))
            copied = {block: bytes(view) for block, view in delta.blobs.items()}
            if copied != self._truth[delta.manifest.version()]:
                raise AssertionError("unverified bytes were copied to a slot")
            self.contents[slot] = copied
        finally:
            self.writing[slot].release()


class Restartable:
    """A DeltaSource whose cache may be replaced: each hold is given back to the cache that granted it."""

    def __init__(self, cache: HostCache) -> None:
        self.cache = cache
        self._held: dict[str, list[HostCache]] = {}

    async def acquire(self, version: str) -> HostDelta:
        cache = self.cache
        delta = await cache.acquire(version)
        self._held.setdefault(version, []).append(cache)
        return delta

    async def release(self, version: str) -> None:
        await self._held[version].pop().release(version)

    async def prefetch(self, version: str) -> bool:
        return await self.cache.prefetch(version)

    async def discard(self, version: str, *, disk: bool = False) -> None:
        await self.cache.discard(version, disk=disk)

    def seconds_away(self, version: str) -> float:
        return self.cache.seconds_away(version)


@dataclass(eq=False)
class Client:
    """One request: it waits for its version, uses it until it may go, and is then done."""

    version: str
    task: asyncio.Task[str]
    may_go: asyncio.Event = field(default_factory=asyncio.Event)
    pin: Pin | None = None


class ChaosHost:
    """One host: store, disk, arena, slots, and clients; all of it on one event loop."""

    def __init__(self, folder: Path) -> None:
        self.store = FaultyStore(folder / "store")
        self.store.create()
        self.disk = folder / "disk"
        self.catalog = Catalog(self.store, BASE)
        self.truth: dict[str, Blobs] = {}
        self.manifests: dict[str, Manifest] = {}
        self.later_s = 0.0
        self.old_caches: list[HostCache] = []
        self.source = Restartable(self._new_cache())
        self.slots = ByteSlots(SLOTS, self.truth)
        metrics = EngineMetrics(CollectorRegistry(), lambda: cast("EngineStats", None))
        self.versions = Versions(self.source, cast("Any", self.slots), SLOTS, metrics)
        self.clients: list[Client] = []
        self._lent: list[int] = []
        self._hints: set[asyncio.Task[None]] = set()
        self.forgotten: list[str] = []
        """What went wrong and nobody was told."""

    @property
    def cache(self) -> HostCache:
        return self.source.cache

    def publish(self, blobs: Blobs) -> str:
        """A version whose manifest and blobs are in the store, those of every other one compressed."""
        compress = len(self.truth) % 2 == 1
        manifest = make_manifest(blobs, compress=compress)
        version = put_version(self.catalog, blobs, compress=compress)
        self.truth[version] = blobs
        self.manifests[version] = manifest
        return version

    def unpublish(self, version: str) -> None:
        """The manifest leaves the store."""
        self.store.delete(f"{BASE}/versions/{version}.json")

    def repair(self, version: str) -> None:
        """Everything of a version is written to the store again."""
        compressed = any(entry.stored_as for entry in self.manifests[version].blobs)
        put_version(self.catalog, self.truth[version], compress=compressed)

    def corrupt(self, version: str, block: int) -> None:
        """One blob in the store changes."""
        entry = self.manifests[version].blobs[block % len(self.manifests[version].blobs)]
        key = self.catalog.blob_key(entry.object_digest)
        data = bytearray(FileStore.get(self.store, key))
        data[len(data) // 2] ^= 0x10
        self.store.put(key, bytes(data))

    def damage_disk(self, index: int, how: str) -> None:
        """Something happens to the disk tier's files."""
        files = sorted(self.disk.glob("*-*")) if self.disk.is_dir() else []
        if how == "folder gone":
            shutil.rmtree(self.disk, ignore_errors=True)
        elif files:
            file = files[index % len(files)]
            if how == "gone":
                file.unlink(missing_ok=True)
            elif file.exists():
                data = file.read_bytes()
                file.write_bytes(data[:-1] if how == "short" else bytes(len(data)))

    def ask(self, version: str, timeout_s: float) -> Client:
        """A request for a version."""
        client = Client(version, asyncio.get_running_loop().create_future())  # type: ignore[arg-type]
        client.task = asyncio.create_task(self._serve(client, timeout_s))
        self.clients.append(client)
        return client

    def hint(self, version: str, *, device: bool) -> None:
        """Somebody will want a version soon."""
        self._hint(self.versions.prefetch(version, "device" if device else "host", LOAD_TIMEOUT_S))

    def unload(self, version: str, *, disk: bool) -> None:
        """Nobody will want a version any more."""
        self._hint(self.versions.unload(version, disk=disk))

    async def lend(self) -> None:
        """Something else takes a slot, if one can be had, and writes to it."""
        slot = await self.versions.lend(1)
        if slot is not None:
            assert self.slots.writing[slot].acquire(blocking=False), "a slot was lent while a load wrote to it"
            self.slots.contents[slot] = None
            self._lent.append(slot)

    def take_back(self) -> None:
        """A slot that was lent serves versions again."""
        if self._lent:
            slot = self._lent.pop()
            self.slots.writing[slot].release()
            self.versions.table.take_back(slot)

    async def restart_cache(self) -> None:
        """The node's store dies and comes back empty; the disk stays."""
        self.store.gate.set()
        old = self.cache
        await old.close()
        self.old_caches.append(old)
        self.source.cache = self._new_cache()

    def check(self) -> None:
        """The invariants of every moment."""
        for cache in (self.cache, *self.old_caches):
            cache.check()
        self.versions.table.check()
        for client in self.clients:
            if client.pin is not None:
                found = self.slots.contents[client.pin.slot]
                assert found == self.truth[client.version], "a pinned version's bytes changed"
        assert not self.forgotten, self.forgotten

    async def settle(self) -> None:
        """All faults end; everybody is answered, everything that is intact can be had, and nothing is left over."""
        self.store.faults.clear()
        self.store.gate.set()
        while self._lent:
            self.take_back()
        for client in self.clients:
            client.may_go.set()
        done = asyncio.gather(*(client.task for client in self.clients), return_exceptions=True)
        for end in await asyncio.wait_for(done, 30):
            if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
                raise end
        await asyncio.wait_for(asyncio.gather(*self._hints), 30)
        await self._let_reads_end()
        self.check()
        self.later_s += 10_000.0
        for version in self.truth:
            self.repair(version)
            assert (version[:12], await self.ask_and_go(version)) == (version[:12], "served"), "though all is well"
        await self.versions.close()
        self.versions.table.check()
        assert not self.versions.table.loading
        await self.cache.close()
        for cache in (self.cache, *self.old_caches):
            assert cache.stats().held_bytes == 0, "a hold leaked"
        self.check()

    async def _let_reads_end(self) -> None:
        """Those from before the faults ended may still fail whoever joins them."""
        for _ in range(10_000):
            if not (self.store.reading or self.cache.stats().fetching or self.versions.table.loading):
                return
            await asyncio.sleep(0.001)
        raise TimeoutError("something is read for ever")

    async def ask_and_go(self, version: str) -> str:
        """One request that is done as soon as it may be."""
        client = self.ask(version, 20.0)
        client.may_go.set()
        return await client.task

    def _hint(self, work: Coroutine[Any, Any, object]) -> None:
        async def run() -> None:
            with contextlib.suppress(DeltaZipError):
                await work

        task = asyncio.create_task(run())
        self._hints.add(task)

    async def _serve(self, client: Client, timeout_s: float) -> str:
        try:
            pin = await self.versions.pin(client.version, timeout_s)
        except DeltaZipError as error:
            return type(error).__name__
        try:
            await self.versions.confirm(pin)
            client.pin = pin
            await client.may_go.wait()
        finally:
            client.pin = None
            self.versions.table.unpin(pin)
        return "served"

    def _new_cache(self) -> HostCache:
        settings = NodeStoreConfig(
            fetch_threads=3,
            room_timeout_s=0.3,
            breaker=BreakerConfig(failures=2, backoff_s=0.01, backoff_max_s=0.05),
            quarantine_s=0.02,
            disk_dir=self.disk,
            disk_bytes=MIB,
        )
        clock = lambda: time.monotonic() + self.later_s  # noqa: E731
        return HostCache(self.catalog, bytearray(ARENA_PAGES * ALIGNMENT), settings, CollectorRegistry(), clock)


class LoopDriver:
    """An event loop that runs when it is told to, so that a synchronous test can look at the world in between."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._runner.__enter__()
        self.forgotten: list[str] = []
        self._runner.get_loop().set_exception_handler(lambda _, context: self.forgotten.append(str(context)))

    def run(self, call: Callable[..., Awaitable[Any]] | Callable[..., Any], *args: Any) -> Any:
        """Call a function, or a coroutine function, on the loop."""
        return self._runner.run(self._call(functools.partial(call, *args)))

    def close(self) -> None:
        self._runner.close()

    @staticmethod
    async def _call(call: Callable[[], Any]) -> Any:
        result = call()
        return await result if asyncio.iscoroutine(result) else result
