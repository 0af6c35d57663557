"""Which blobs are in the arena, who holds them, and which one goes when room is needed."""

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
    """Brings blobs to the arena."""

    def __call__(self, entry: BlobEntry, buffer: memoryview, asked: float) -> Tier:
        """Fill a blob's place with verified bytes and tell where they were, or raise. Runs in a thread.

        ``asked``: when it was asked for, by time.perf_counter.
        """
        ...

    def tier(self, key: BlobKey) -> Tier:
        """Where a blob is now, ``disk`` or ``remote``. Cheap."""
        ...

    def seconds_per_byte(self, key: BlobKey) -> float:
        """What it would take now, by experience. Cheap."""
        ...


@dataclass(eq=False)
class Blob:
    """A blob's place in the arena. Its bytes may be used when ``ready`` is done without an error, while it is held."""

    key: BlobKey
    offset: int
    ready: asyncio.Future[Tier]
    """Where the bytes were found."""
    pool: FetchPool[Tier]
    """Where its fetch is, or was."""
    job: Job[Tier] | None = None
    """The fetch; None when it is over."""
    holds: int = 0
    leaving: bool = False
    """Whether it goes when nobody holds it any more."""

    @property
    def evictable(self) -> bool:
        """Whether its room may be taken."""
        return not self.holds and self.job is None


class BlobTable:
    """Blobs in an arena. It belongs to one event loop; only ``fetch`` runs in threads."""

    def __init__(
        self,
        memory: memoryview,
        fetch: Fetch,
        pools: Mapping[Tier, FetchPool[Tier]],
        quarantine: Quarantine,
        popularity: Popularity[BlobKey],
    ) -> None:
        """``pools``: by where a blob is, ``disk`` or ``remote``, so that the disk waits for no store."""
        self._popularity = popularity
        self._memory = memory
        self._fetch = fetch
        self._pools = pools
        self._quarantine = quarantine
        self._arena = ArenaAllocator(len(memory))
        self._blobs: dict[BlobKey, Blob] = {}  # those that were let go of least recently come first
        self.room_changed = asyncio.Event()
        """Set whenever there may be more room than before."""
        self._evictions = 0

    @property
    def arena_bytes(self) -> int:
        """Room in all."""
        return self._arena.size

    def has_all(self, entries: Iterable[BlobEntry]) -> bool:
        """Whether all of these blobs are here or on their way."""
        return all(blob_key(entry) in self._blobs for entry in entries)

    def ready(self, entries: Iterable[BlobEntry]) -> bool:
        """Whether all of these blobs are here."""
        found = (self._blobs.get(blob_key(entry)) for entry in entries)
        return all(blob is not None and blob.job is None for blob in found)

    def view(self, blob: Blob) -> memoryview:
        """A blob's bytes."""
        return self._memory[blob.offset : blob.offset + blob.key[1]]

    def try_hold(self, version: str, entries: Sequence[BlobEntry], *, ahead: bool = False) -> list[Blob] | None:
        """Hold a blob for each entry, fetches of those that are missing under way; None when there is no room.

        All or nothing: without room for all nobody is held and nothing is fetched. ``version`` is on whose behalf.
        ``ahead``: nobody waits for it yet. Raises BlobCorrupt when one of those that are missing is in quarantine.
        """
        self.refuse_quarantined(entries)
        wanted = {blob_key(entry): entry for entry in entries}
        # An attempt that fails for want of gaps has evicted all it can, so that another one finds the gaps whole.
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
        """Raise BlobCorrupt when a blob that is missing would not be fetched."""
        self._quarantine.refuse(entry for entry in entries if blob_key(entry) not in self._blobs)

    def let_go(self, blobs: Iterable[Blob]) -> None:
        """Undo one ``try_hold``. A fetch that nobody wants any more is dropped unless it has begun."""
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
        """Free the room of blobs, of each as soon as nobody holds it."""
        for key in keys:
            blob = self._blobs.get(key)
            if blob is not None:
                blob.leaving = True
                if blob.evictable:
                    self._remove(blob)

    def seconds_away(self, entries: Iterable[BlobEntry]) -> float:
        """What fetching those that are not here yet would take, one after the other."""
        keys = {blob_key(entry) for entry in entries if not self.ready((entry,))}
        return sum(key[1] * self._fetch.seconds_per_byte(key) for key in keys)

    def cancel_fetches(self, error: Exception) -> None:
        """Fail the fetches that have not begun."""
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
            raise StoreError("host arena: bytes are taken by no blob; restart the node store and report this")
        if any(blob.holds < 0 for blob in self._blobs.values()):
            raise StoreError("host arena: a blob was let go of too often; restart the node store and report this")

    def _place_missing(self, wanted: Set[BlobKey]) -> dict[BlobKey, int] | None:
        """Take room for those of ``wanted`` that are missing, evicting what nobody holds; None when it is not enough.

        When the gaps that others leave are too small, wanted blobs are evicted too, and are missing then.
        """
        missing = [key for key in wanted if key not in self._blobs]
        others = [blob for blob in self._blobs.values() if blob.evictable and blob.key not in wanted]
        room = self._arena.free_bytes + sum(aligned(blob.key[1]) for blob in others)
        if sum(aligned(size) for _, size in missing) > room:
            return None
        victims = self._victims(others, wanted)
        offsets: dict[BlobKey, int] = {}
        for key in missing:  # grows while it is walked
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
        """``others``, those worth least first, and then the wanted ones. Nothing is compared before it must be."""
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
        """Free a blob's room; those who wait for it get ``error``."""
        del self._blobs[blob.key]
        self._arena.free(blob.offset)
        if error is not None:
            blob.ready.set_exception(error)
            blob.ready.exception()  # seen, even if nobody waits
        self.room_changed.set()
