"""A host cache over a store that misbehaves as a test asks."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.config import BreakerConfig, NodeStoreConfig
from deltazip_ray.errors import (
    StoreUnavailable,
)
from deltazip_ray.residency.arena import ALIGNMENT
from deltazip_ray.residency.host_cache import HostCache
from tests.support.faulty_store import Fault, FaultyStore
from tests.support.plain_versions import BASE, put_version
from tests.support.waiting import until

PAGES = 8


def page(fill: str, pages: int = 1) -> bytes:
    """A blob that takes whole pages but is a little smaller."""
    return fill.encode() * (pages * ALIGNMENT - 7)


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


def as_bytes(blobs: Mapping[str, memoryview]) -> dict[str, bytes]:
    return {block: bytes(view) for block, view in blobs.items()}
