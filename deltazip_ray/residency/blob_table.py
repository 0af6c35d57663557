"""The blobs in the arena: which are there, which are held, and which to evict when room is needed."""

import asyncio
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from deltazip_ray.artifact.manifest import BlobEntry
from deltazip_ray.errors import BlobCorrupt, StoreError
from deltazip_ray.observability.host_metrics import HostStats
from deltazip_ray.residency.arena import ArenaAllocator, aligned
from deltazip_ray.residency.fetch_pool import FetchPool, Job
from deltazip_ray.residency.popularity import Popularity
from deltazip_ray.residency.quarantine import BlobKey, Quarantine, blob_key
from deltazip_ray.residency.tiers import Tier


class Fetch(Protocol):
    """Fetches blobs into the arena."""

    def __call__(self, entry: BlobEntry, buffer: memoryview, asked: float) -> Tier:
        """Fill ``buffer`` with verified bytes and return the tier they came from, or raise. Runs in a thread.

        ``asked``: time.perf_counter() of the request.
        """
        ...

    def tier(self, key: BlobKey) -> Tier:
        """The tier that has the blob now, ``disk`` or ``remote``. Cheap."""
        ...

    def seconds_per_byte(self, key: BlobKey) -> float:
        """The expected speed of a fetch. Cheap."""
        ...


@dataclass(eq=False)
class Blob:
    """A blob's place in the arena. Its bytes may be used when ``ready`` is done without an error, while it is held."""

    key: BlobKey
    offset: int
    ready: asyncio.Future[Tier]
    """The tier that the bytes came from."""
    pool: FetchPool[Tier]
    """Runs its fetch."""
    job: Job[Tier] | None = None
    """Its fetch; None when that is over."""
    holds: int = 0
    leaving: bool = False
    """Whether to remove it at the last release."""

    @property
    def evictable(self) -> bool:
        """Whether it is neither held nor being fetched."""
        return not self.holds and self.job is None


class BlobTable:
    """Blobs in an arena. Belongs to one event loop; only ``fetch`` runs in threads."""

    def __init__(
        self,
        memory: memoryview,
        fetch: Fetch,
        pools: Mapping[Tier, FetchPool[Tier]],
        quarantine: Quarantine,
        popularity: Popularity[BlobKey],
    ) -> None:
        """``pools``: one for ``disk`` and one for ``remote``, so that disk reads never wait for the store."""
        self._popularity = popularity
        self._memory = memory
        self._fetch = fetch
        self._pools = pools
        self._quarantine = quarantine
        self._arena = ArenaAllocator(len(memory))
        self._blobs: dict[BlobKey, Blob] = {}  # least recently released first
        self.room_changed = asyncio.Event()
        """Set whenever more room may have become available."""
        self._evictions = 0

    @property
    def arena_bytes(self) -> int:
        """Size of the arena."""
        return self._arena.size

    def has_all(self, entries: Iterable[BlobEntry]) -> bool:
        """Whether all of these blobs are in the arena or being fetched."""
        return all(blob_key(entry) in self._blobs for entry in entries)

    def ready(self, entries: Iterable[BlobEntry]) -> bool:
        """Whether all of these blobs are in the arena."""
        found = (self._blobs.get(blob_key(entry)) for entry in entries)
        return all(blob is not None and blob.job is None for blob in found)

    def view(self, blob: Blob) -> memoryview:
        """A blob's bytes."""
        return self._memory[blob.offset : blob.offset + blob.key[1]]

    def try_hold(self, version: str, entries: Sequence[BlobEntry], *, ahead: bool = False) -> list[Blob] | None:
        """Hold a blob for each entry and start to fetch the missing ones; None when there is no room.

        All or nothing: without room for all of them no blob is held and nothing is fetched. The fetches run on behalf
        of ``version``. ``ahead``: nobody waits for it yet. Raises BlobCorrupt when a missing one is in quarantine.
        """
        self.refuse_quarantined(entries)
        wanted = {blob_key(entry): entry for entry in entries}
        # An attempt that fails because of fragmentation has evicted all it can, so the second one finds merged gaps.
        offsets = self._place_missing(wanted.keys())
        if offsets is None:
            offsets = self._place_missing(wanted.keys())
        if offsets is None:
            return None
        for key, offset in offsets.items():
            self._start(version, wanted[key], offset, ahead)
        blobs = [self._blobs[blob_key(entry)] for entry in entries]
        for blob in blobs:
            blob.holds += 1
            blob.leaving = False
            if blob.job is not None and not ahead:
                blob.pool.hasten(blob.job)
        return blobs

    def refuse_quarantined(self, entries: Iterable[BlobEntry]) -> None:
        """Raise BlobCorrupt when a missing blob is in quarantine."""
        self._quarantine.refuse(entry for entry in entries if blob_key(entry) not in self._blobs)

    def let_go(self, blobs: Iterable[Blob]) -> None:
        """Undo one ``try_hold``. A fetch that nobody wants any more is dropped unless it has started."""
        blobs = list(blobs)
        self._popularity.used(blob.key for blob in blobs)
        for blob in blobs:
            blob.holds -= 1
            if blob.holds or self._blobs.get(blob.key) is not blob:
                continue
            if blob.leaving if blob.job is None else blob.pool.cancel(blob.job):
                self._remove(blob)
            else:
                self._blobs[blob.key] = self._blobs.pop(blob.key)
        self.room_changed.set()

    def discard(self, keys: Iterable[BlobKey]) -> None:
        """Remove blobs, each as soon as nobody holds it."""
        for key in keys:
            blob = self._blobs.get(key)
            if blob is not None:
                blob.leaving = True
                if blob.evictable:
                    self._remove(blob)

    def seconds_away(self, entries: Iterable[BlobEntry]) -> float:
        """Expected time to fetch the missing ones, one after the other."""
        keys = {blob_key(entry) for entry in entries if not self.ready((entry,))}
        return sum(key[1] * self._fetch.seconds_per_byte(key) for key in keys)

    def cancel_fetches(self, error: Exception) -> None:
        """Fail the fetches that have not started."""
        for blob in list(self._blobs.values()):
            if blob.job is not None and blob.pool.cancel(blob.job):
                self._remove(blob, error)

    def stats(self) -> HostStats:
        """The state of the arena now."""
        blobs = list(self._blobs.values())
        free = self._arena.free_bytes
        cached = sum(aligned(blob.key[1]) for blob in blobs if blob.evictable)
        return HostStats(
            arena_bytes=self._arena.size,
            free_bytes=free,
            cached_bytes=cached,
            held_bytes=self._arena.size - free - cached,
            blobs=len(blobs),
            fetching=sum(blob.job is not None for blob in blobs),
            evictions=self._evictions,
        )

    def check(self) -> None:
        """Raise StoreError unless arena and blobs agree."""
        self._arena.check()
        if sum(aligned(blob.key[1]) for blob in self._blobs.values()) + self._arena.free_bytes != self._arena.size:
            raise StoreError("host arena: bytes belong to no blob; restart the node store and report this")
        if any(blob.holds < 0 for blob in self._blobs.values()):
            raise StoreError("host arena: a blob was released too often; restart the node store and report this")

    def _place_missing(self, wanted: Set[BlobKey]) -> dict[BlobKey, int] | None:
        """Allocate room for the missing blobs of ``wanted``, evicting what nobody holds; None when there is not enough.

        If evicting the others leaves gaps that are too small, wanted blobs are evicted too, and become missing.
        """
        missing = [key for key in wanted if key not in self._blobs]
        others = [blob for blob in self._blobs.values() if blob.evictable and blob.key not in wanted]
        room = self._arena.free_bytes + sum(aligned(blob.key[1]) for blob in others)
        if sum(aligned(size) for _, size in missing) > room:
            return None
        victims = self._victims(others, wanted)
        offsets: dict[BlobKey, int] = {}
        for key in missing:  # grows during the iteration
            while (offset := self._arena.allocate(key[1])) is None:
                victim = next(victims, None)
                if victim is None:
                    for taken in offsets.values():
                        self._arena.free(taken)
                    return None
                self._remove(victim)
                self._evictions += 1
                if victim.key in wanted:
                    missing.append(victim.key)
            offsets[key] = offset
        return offsets

    def _victims(self, others: list[Blob], wanted: Set[BlobKey]) -> Iterator[Blob]:
        """``others``, the least valuable first, and then the wanted ones. Sorts only when the first one is needed."""
        yield from sorted(others, key=lambda blob: self._worth(blob.key))
        yield from [blob for blob in self._blobs.values() if blob.evictable and blob.key in wanted]

    def _worth(self, key: BlobKey) -> float:
        return self._popularity.worth(key, self._fetch.seconds_per_byte(key))

    def _start(self, version: str, entry: BlobEntry, offset: int, ahead: bool) -> None:
        key = blob_key(entry)
        blob = Blob(key, offset, asyncio.get_running_loop().create_future(), self._pools[self._fetch.tier(key)])
        self._blobs[blob.key] = blob
        fetch = functools.partial(self._fetch, entry, self.view(blob), time.perf_counter())
        blob.job = blob.pool.submit(version, fetch, functools.partial(self._fetched, blob), ahead=ahead)

    def _fetched(self, blob: Blob, result: Future[Tier]) -> None:
        blob.job = None
        error = result.exception()
        if error is None:
            blob.ready.set_result(result.result())
            if blob.leaving and blob.evictable:
                self._remove(blob)
            self.room_changed.set()
        else:
            if isinstance(error, BlobCorrupt):
                self._quarantine.add(blob.key)
            self._remove(blob, error)

    def _remove(self, blob: Blob, error: BaseException | None = None) -> None:
        """Free a blob's room; its waiters get ``error``."""
        del self._blobs[blob.key]
        self._arena.free(blob.offset)
        if error is not None:
            blob.ready.set_exception(error)
            blob.ready.exception()  # retrieved, so that asyncio does not complain if nobody waits
        self.room_changed.set()
