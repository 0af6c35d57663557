"""The node store: one detached actor per host and application, found by name.

Nobody owns it: it runs while replicas send heartbeats, and ends by itself some time after the last one.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from prometheus_client import CollectorRegistry, generate_latest

from deltazip_deployments.background import in_background
from deltazip_deployments.logs import log_to_stderr
from deltazip_deployments.node_store.arena import Arena, ArenaRef
from deltazip_deployments.node_store.leases import Leases
from deltazip_deployments.node_store.protocol import NodeReport, StoredDelta
from deltazip_deployments.node_store.succession import Succession
from deltazip_ray.artifact.catalog import Catalog, Variant
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import NodeStoreConfig, StoreConfig
from deltazip_ray.errors import DeltaZipError
from deltazip_ray.residency.host_cache import HostCache

_NAMES_PERIOD_S = 5.0
"""Interval for reading the variants' aliases."""
_LINGER_LEASES = 4
"""It ends after this many lease timeouts without a replica, so that a restarting one finds the deltas still here."""

logger = logging.getLogger(__name__)


class NodeStore:
    """A host cache with leases for the replicas of the host."""

    def __init__(
        self,
        node: str,
        cache: HostCache,
        arena: Arena,
        lease_timeout_s: float,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
        retire_after_s: float = 30.0,
    ) -> None:
        """``retire_after_s``: time from the loss of a version's last alias until it is dropped."""
        self._succession = Succession(retire_after_s)
        self._retired: dict[str, set[str]] = {}
        self._heirs: dict[str, asyncio.Task[bool]] = {}
        """Versions being fetched because an alias moved to them."""
        self._node = node
        self._cache = cache
        self._arena = arena
        self._leases = Leases(lease_timeout_s, clock())
        self._registry = registry
        self._clock = clock
        self._metrics: dict[str, str] = {}

    async def arena(self) -> ArenaRef:
        """How to map the memory."""
        return self._arena.ref

    async def acquire(self, replica: str, version: str) -> StoredDelta:
        """Hold a version for a replica; raises the errors of HostCache."""
        self._leases.touch(replica, self._clock())
        delta = await self._cache.acquire(version)
        self._leases.touch(replica, self._clock())
        self._leases.add(replica, version)
        return StoredDelta(delta.manifest, self._cache.offsets(version), delta.tier)

    async def release(self, replica: str, version: str) -> bool:
        """Release one hold; False if it had been dropped."""
        self._leases.touch(replica, self._clock())
        kept = self._leases.remove(replica, version)
        if kept:
            await self._cache.release(version)
        return kept

    async def prefetch(self, version: str) -> bool:
        """See DeltaSource."""
        return await self._cache.prefetch(version)

    async def discard(self, version: str, disk: bool) -> None:
        """See DeltaSource."""
        await self._cache.discard(version, disk=disk)

    async def retired(self, replica: str) -> frozenset[str]:
        """Versions that this replica should drop, as they have no alias any more. Each is returned once."""
        return frozenset(self._retired.pop(replica, ()))

    async def heartbeat(self, replica: str, metrics: str) -> frozenset[str]:
        """Renew a replica's lease; returns the versions in memory."""
        self._leases.touch(replica, self._clock())
        self._metrics[replica] = metrics
        return self._cache.versions

    async def leave(self, replica: str) -> None:
        """A replica ends: drop its holds and its metrics."""
        self._metrics.pop(replica, None)
        self._retired.pop(replica, None)
        for version in self._leases.drop(replica):
            await self._cache.release(version)

    async def report(self) -> NodeReport:
        """The metrics of this host and its replicas."""
        return NodeReport(self._node, generate_latest(self._registry).decode(), dict(self._metrics))

    async def follow(self, variants: Iterable[Variant]) -> None:
        """Fetch versions that aliases moved to, if the old version is in memory, and drop versions without aliases.

        A version is dropped some time after it lost its last alias.
        """
        change = self._succession.update(variants, self._clock())
        for old, new in change.heirs:
            # A version that is still being fetched when its alias moves on has an heir too.
            if (old in self._cache.versions or old in self._heirs) and new not in self._heirs:
                self._heirs[new] = asyncio.create_task(self._bring_heir(new))
        for replica in self._leases.replicas:
            self._retired.setdefault(replica, set()).update(change.retired)
        for version in change.retired & self._cache.versions:
            logger.info("dropping version %s, which has no alias any more", version[:12])
            await self._cache.discard(version)

    async def _bring_heir(self, version: str) -> bool:
        try:
            return await self._cache.prefetch(version)
        finally:
            del self._heirs[version]

    async def drop_silent(self) -> float:
        """Drop the holds of silent replicas; returns for how many seconds there has been no replica."""
        now = self._clock()
        for replica in self._leases.silent(now):
            logger.warning("replica %s sends no heartbeats: dropping its holds", replica)
            await self.leave(replica)
        return self._leases.alone_s(now)


class NodeStoreProcess(NodeStore):
    """Builds itself from settings, and ends its actor when nobody needs it."""

    def __init__(self, node: str, store: StoreConfig, settings: NodeStoreConfig, base_digest: str) -> None:
        """Raises ConfigError when the arena does not fit."""
        log_to_stderr()
        arena = Arena(settings.shm_dir, settings.arena_bytes)
        registry = CollectorRegistry()
        catalog = Catalog(open_store(store), base_digest)
        cache = HostCache(catalog, arena.buffer, settings, registry)
        self._awake_s = 0.0
        super().__init__(
            node,
            cache,
            arena,
            settings.lease_timeout_s,
            registry,
            clock=lambda: self._awake_s,
            retire_after_s=settings.retire_after_s,
        )
        self._tasks = (
            in_background(self._watch(settings.lease_timeout_s), "what silent replicas hold is no longer dropped"),
            in_background(self._follow_names(catalog), "versions are no longer replaced as their aliases move"),
        )

    async def _follow_names(self, catalog: Catalog) -> None:
        while True:
            try:
                await self.follow(await asyncio.to_thread(catalog.variants))
            except DeltaZipError as error:
                logger.info("the variants cannot be read now: %s", error.message)
            await asyncio.sleep(_NAMES_PERIOD_S)

    async def _watch(self, lease_timeout_s: float) -> None:
        alone_s, period_s = 0.0, lease_timeout_s / 4
        while alone_s < _LINGER_LEASES * lease_timeout_s:
            await asyncio.sleep(period_s)
            # Counted, not measured: after a SIGSTOP this process must not take its replicas for silent.
            self._awake_s += period_s
            alone_s = await self.drop_silent()
        logger.info("no replica needs this node store any more")
        ray.kill(ray.get_runtime_context().current_actor)


NodeStoreActor: Any = ray.remote(NodeStoreProcess)
