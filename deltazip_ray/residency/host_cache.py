"""The host tier: verified blobs in one arena, shared by all versions that have them in common.

* **Single flight.** A blob is fetched once for all versions and callers that want it. They share the result, including
  a failure, even those who joined late; a caller that leaves does not affect the others. When the last one leaves,
  running fetches finish and stay cached (a thread cannot be stopped while it writes); queued ones are dropped.
* **Only verified blobs are visible.** A blob is published after its sha256 was checked, never before.
* **Disk before store.** With ``node_store.disk_dir``, blobs and manifests from the store are also written to disk, off
  the path of requests, and read from there after an eviction or a restart; see :mod:`disk_tier`.
* **Held blobs neither move nor leave.** The others stay until their room is needed. The least valuable ones, by
  popularity and by the cost of fetching them again, leave first; see :mod:`popularity`.
* **Requests before prefetches.** Prefetches use threads that nothing else needs, and give up their room when a
  version that a request waits for needs it.
* **Failures are not repeated endlessly.** A version that keeps failing gets its last error at once until a later
  attempt succeeds, see :mod:`breakers`; a blob that arrived damaged twice is not fetched for a while, see
  :mod:`quarantine`. Versions whose blobs are all in the arena, and all other versions, are not affected.
* **Fair shares.** Versions take turns at the fetch threads, and none gets all of them; see :mod:`fetch_pool`.
  Disk reads have threads of their own, so they never wait for a store that hangs.
* **No deadlock.** A version gets room for all of its missing blobs at once or for none, so that nobody holds a part
  while waiting for the rest. Versions that find no room wait in order of arrival, holding nothing; one whose blobs are
  all there passes them. A version that is larger than the arena gets StoreFull at once; one that has waited for
  ``room_timeout_s`` gets it then, so that nobody waits forever for room that is never released.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.config import NodeStoreConfig
from deltazip_ray.errors import ConfigError, DeltaZipError, StoreError, StoreFull, StoreUnavailable
from deltazip_ray.observability.host_metrics import HostMetrics, HostStats
from deltazip_ray.residency.arena import aligned
from deltazip_ray.residency.blob_fetch import BlobFetcher
from deltazip_ray.residency.blob_table import Blob, BlobTable
from deltazip_ray.residency.breakers import Breakers
from deltazip_ray.residency.disk_tier import DiskTier
from deltazip_ray.residency.fetch_pool import FetchPool
from deltazip_ray.residency.manifests import Manifests
from deltazip_ray.residency.popularity import Popularity
from deltazip_ray.residency.quarantine import BlobKey, Quarantine, blob_key
from deltazip_ray.residency.tiers import HostDelta, HostMemory, Tier

_PREFETCHES = 4
"""Limit of concurrent prefetches."""
_UNKNOWN_S = 1.0
"""Assumed fetch time of a version whose manifest is not known."""

logger = logging.getLogger(__name__)

_SLOWNESS: Sequence[Tier] = ("host", "disk", "remote")


@dataclass(eq=False)
class _Held:
    """A version that callers hold."""

    manifest: Manifest
    blobs: Sequence[Blob]
    """One for each entry of the manifest, in its order."""
    count: int = 0


class HostCache:
    """A DeltaSource over a catalog. Belongs to one event loop; only reads run in threads."""

    def __init__(
        self,
        catalog: Catalog,
        buffer: memoryview | bytearray,
        settings: NodeStoreConfig,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``buffer`` is the arena: any writable memory, which the caller keeps alive.

        ``clock`` gives seconds that never go back. Raises ConfigError.
        """
        memory = memoryview(buffer).cast("B")
        if memory.readonly:
            raise ConfigError("the host arena is read-only: map it writable")
        self._memory = HostMemory(memory)
        self._pools: Mapping[Tier, FetchPool[Tier]] = {
            "disk": FetchPool(settings.fetch_threads, shared=False),
            "remote": FetchPool(settings.fetch_threads, shared=True),
        }
        self._metrics = HostMetrics(registry, self.stats)
        self._breakers = Breakers(settings.breaker, clock)
        self._quarantine = Quarantine(settings.quarantine_s, clock)
        self._disk = DiskTier.from_settings(settings, registry, clock)
        self._manifests = Manifests(catalog, self._disk)
        fetch = BlobFetcher(catalog, self._disk, self._metrics, settings.fetch_bytes_per_s)
        popularity = Popularity[BlobKey](settings.eviction_half_life)
        self._blobs = BlobTable(memory, fetch, self._pools, self._quarantine, popularity)
        self._room_timeout_s = settings.room_timeout_s
        self._held: dict[str, _Held] = {}
        self._prefetches: dict[str, asyncio.Task[bool]] = {}
        self._turn = asyncio.Lock()  # serves its waiters in order of arrival
        self._closed = False

    @property
    def versions(self) -> frozenset[str]:
        """Versions whose blobs are all in the arena, held or not."""
        return frozenset(name for name, manifest in self._manifests.known.items() if self._blobs.ready(manifest.blobs))

    async def acquire(self, version: str) -> HostDelta:
        """Fetch a version and hold it until :meth:`release`. The views are read-only.

        Raises InvalidName, ObjectNotFound, ManifestInvalid, BaseMismatch, BlobCorrupt, StoreUnavailable, StoreFull.
        """
        try:
            with self._guard(version):
                if self._closed:
                    raise _closed()
                manifest = await self._manifests.get(version)
                blobs, tier = await self._hold(version, manifest)
        except DeltaZipError as error:
            self._metrics.failures.labels(type(error).__name__).inc()
            raise
        self._held.setdefault(version, _Held(manifest, blobs)).count += 1
        self._metrics.acquires.labels(tier).inc()
        views = [self._blobs.view(blob).toreadonly() for blob in blobs]
        blocks = (entry.block for entry in manifest.blobs)
        return HostDelta(manifest, dict(zip(blocks, views, strict=True)), tier, self._memory)

    async def release(self, version: str) -> None:
        """Undo one :meth:`acquire`; the bytes stay cached. Raises StoreError when the version is not held."""
        held = self._get_held(version)
        held.count -= 1
        if not held.count:
            del self._held[version]
        self._blobs.let_go(held.blobs)

    async def prefetch(self, version: str) -> bool:
        """See DeltaSource. Hints are dropped while a few prefetches are running already."""
        if version not in self._prefetches:
            if self._closed or len(self._prefetches) >= _PREFETCHES:
                return False
            task = self._prefetches[version] = asyncio.create_task(self._prefetch(version))
            task.add_done_callback(lambda _: self._prefetches.pop(version))
        task = self._prefetches[version]
        await asyncio.wait({task})
        return not task.cancelled() and task.result()

    async def discard(self, version: str, *, disk: bool = False) -> None:
        """See DeltaSource. Blobs that other versions in the arena share stay, also on disk."""
        manifest = await self._manifests.get(version)
        if version in self._prefetches:
            self._prefetches[version].cancel()
        others = {blob_key(e) for name in self.versions - {version} for e in self._manifests.known[name].blobs}
        keys = {blob_key(entry) for entry in manifest.blobs} - others
        self._blobs.discard(keys)
        self._manifests.forget(version)
        if disk and self._disk is not None:
            await asyncio.to_thread(self._disk.discard, [*keys, (version, len(manifest.canonical()))])

    def seconds_away(self, version: str) -> float:
        """See DeltaSource."""
        manifest = self._manifests.known.get(version)
        return _UNKNOWN_S if manifest is None else self._blobs.seconds_away(manifest.blobs)

    def offsets(self, version: str) -> dict[str, tuple[int, int]]:
        """(offset, size) of each block in the arena, in bytes. Raises StoreError when the version is not held."""
        held = self._get_held(version)
        return {e.block: (b.offset, e.size) for e, b in zip(held.manifest.blobs, held.blobs, strict=True)}

    def stats(self) -> HostStats:
        """The current state."""
        return dataclasses.replace(
            self._blobs.stats(),
            open_breakers=self._breakers.open,
            refusals=self._breakers.refusals,
            quarantined=len(self._quarantine),
            quarantines=self._quarantine.admissions,
        )

    def check(self) -> None:
        """Raise StoreError unless arena, blobs and holds agree."""
        self._blobs.check()
        for held in self._held.values():
            if not self._blobs.ready(held.manifest.blobs) or any(blob.holds < held.count for blob in held.blobs):
                raise StoreError("host cache: a held blob is gone; restart the node store and report this")

    async def close(self) -> None:
        """Fail all waiters with StoreUnavailable, and wait for running reads and writes. Views stay valid."""
        self._closed = True
        self._cancel_prefetches()
        self._blobs.room_changed.set()
        self._blobs.cancel_fetches(_closed())
        await asyncio.gather(*self._prefetches.values(), return_exceptions=True)
        for pool in self._pools.values():
            await asyncio.to_thread(pool.shutdown)
        await self._manifests.close()
        if self._disk is not None:
            await asyncio.to_thread(self._disk.close)

    def _get_held(self, version: str) -> _Held:
        if version not in self._held:
            raise StoreError(f"version {version[:12]} is not held: release it as often as it was acquired")
        return self._held[version]

    def _guard(self, version: str) -> contextlib.AbstractContextManager[None]:
        """Guards one attempt to fetch a version; raises BlobCorrupt at once if one of its blobs is in quarantine."""
        manifest = self._manifests.known.get(version)
        if manifest is not None:
            if self._blobs.ready(manifest.blobs):
                return contextlib.nullcontext()
            self._blobs.refuse_quarantined(manifest.blobs)
        return self._breakers.guard(version)

    async def _prefetch(self, version: str) -> bool:
        """Fetch a version's blobs if there is room now."""
        try:
            with self._guard(version):
                manifest = await self._manifests.get(version)
                blobs = self._blobs.try_hold(version, manifest.blobs, ahead=True)
                if blobs is None:
                    raise StoreFull("there is no room now")
                await self._arrival(blobs)
        except DeltaZipError as error:
            logger.info("version %s was not prefetched: %s", version[:12], error.message)
            return False
        self._blobs.let_go(blobs)
        return True

    def _cancel_prefetches(self) -> None:
        for task in self._prefetches.values():
            task.cancel()

    async def _hold(self, version: str, manifest: Manifest) -> tuple[list[Blob], Tier]:
        """Hold all blobs of a version once they are verified; returns the tier that the slowest one came from.

        Raises as :meth:`acquire`, and holds nothing then.
        """
        blobs = await self._place(version, manifest)
        return blobs, await self._arrival(blobs)

    async def _arrival(self, blobs: Sequence[Blob]) -> Tier:
        """Wait for the bytes of held blobs; returns the slowest one's tier. Releases all of them when one fails."""
        missing = [blob.ready for blob in blobs if not blob.ready.done()]
        try:
            if missing:
                await asyncio.wait(missing, return_when=asyncio.FIRST_EXCEPTION)
            for blob in blobs:
                if blob.ready.done():
                    blob.ready.result()
        except BaseException:
            self._blobs.let_go(blobs)
            raise
        return max((ready.result() for ready in missing), key=_SLOWNESS.index, default="host")

    async def _place(self, version: str, manifest: Manifest) -> list[Blob]:
        """Wait for room, hold all blobs of a version, and start to fetch the missing ones. Raises StoreFull."""
        wanted = sum(aligned(size) for _, size in {blob_key(entry) for entry in manifest.blobs})
        arena = self._blobs.arena_bytes
        if wanted > arena:
            raise StoreFull(
                f"version {version[:12]} takes {wanted} bytes, the host arena has {arena}: raise node_store.arena_bytes"
            )
        if self._blobs.has_all(manifest.blobs) and (blobs := self._blobs.try_hold(version, manifest.blobs)) is not None:
            return blobs
        try:
            async with asyncio.timeout(self._room_timeout_s), self._turn:
                while not self._closed:
                    blobs = self._blobs.try_hold(version, manifest.blobs)
                    if blobs is not None:
                        return blobs
                    self._blobs.room_changed.clear()
                    self._cancel_prefetches()
                    await self._blobs.room_changed.wait()
        except TimeoutError:
            now = self.stats()
            raise StoreFull(
                f"version {version[:12]} takes {wanted} bytes, but {len(self._held)} versions hold {now.held_bytes} of "
                f"the {arena} bytes of the host arena: try again later, or raise node_store.arena_bytes"
            ) from None
        raise _closed()


def _closed() -> StoreUnavailable:
    return StoreUnavailable("the host cache was closed: try again in a moment")
