"""Reads a blob from the disk or the store into a given place in memory and verifies it. Runs in threads."""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing

import numpy as np

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.digests import Verifier
from deltazip_ray.artifact.lossless import decode
from deltazip_ray.artifact.manifest import BlobEntry
from deltazip_ray.config import MIB
from deltazip_ray.errors import BlobCorrupt
from deltazip_ray.observability.host_metrics import HostMetrics
from deltazip_ray.residency.disk_tier import DiskTier
from deltazip_ray.residency.pace import Pace
from deltazip_ray.residency.quarantine import BlobKey, blob_key
from deltazip_ray.residency.tiers import Tier

_KEPT = 0.95
"""Weight of the past in the average speed, for each new blob."""


class _Speed:
    """Seconds per byte, averaged over recent transfers."""

    def __init__(self, seconds_per_byte: float) -> None:
        """Start from a guess that weighs as much as one large blob."""
        self._bytes = float(64 * MIB)
        self._seconds = seconds_per_byte * self._bytes

    @property
    def seconds_per_byte(self) -> float:
        return self._seconds / self._bytes

    def moved(self, size: int, seconds: float) -> None:
        self._bytes = _KEPT * self._bytes + size
        self._seconds = _KEPT * self._seconds + seconds


class BlobFetcher:
    """Fetches blobs from the nearest tier that has them."""

    def __init__(
        self, catalog: Catalog, disk: DiskTier | None, metrics: HostMetrics, bytes_per_s: float | None = None
    ) -> None:
        """``bytes_per_s`` limits reads from the store, all threads together."""
        self._catalog = catalog
        self._disk = disk
        self._metrics = metrics
        self._pace = Pace(bytes_per_s)
        self._speeds: dict[Tier, _Speed] = {"disk": _Speed(1e-9), "remote": _Speed(1e-8)}
        self._lock = threading.Lock()

    def tier(self, key: BlobKey) -> Tier:
        """See :class:`Fetch`."""
        return "disk" if self._disk is not None and self._disk.has(key) else "remote"

    def seconds_per_byte(self, key: BlobKey) -> float:
        """See :class:`Fetch`: the recent speed of the tier that has the blob."""
        return self._speeds[self.tier(key)].seconds_per_byte

    def __call__(self, entry: BlobEntry, buffer: memoryview, asked: float) -> Tier:
        """Fill ``buffer``, of ``entry.size`` bytes, with the blob and check its sha256; returns the tier it came from.

        Blobs from the store are offered to the disk, which may read ``buffer`` later. A damaged blob is fetched once
        more, as the network may have damaged it. Raises BlobCorrupt when it is damaged again. ObjectNotFound and
        StoreUnavailable are raised at once: the store has made its own attempts.
        """
        began = time.perf_counter()
        self._metrics.stage_seconds.labels("queue").observe(began - asked)
        tier: Tier = "disk"
        if not self._from_disk(entry, buffer):
            tier = "remote"
            try:
                self._read(entry, buffer)
            except BlobCorrupt:
                self._metrics.refetches.inc()
                self._read(entry, buffer)
            if self._disk is not None:
                self._disk.offer(blob_key(entry), buffer)
        seconds = time.perf_counter() - began
        with self._lock:
            self._speeds[tier].moved(entry.size, seconds)
        self._metrics.fetch_seconds.labels(tier).observe(seconds)
        self._metrics.fetched_bytes.labels(tier).inc(entry.size if tier == "disk" else entry.object_size)
        return tier

    def _stage(self, name: str) -> AbstractContextManager[object]:
        """Time one stage of a fetch."""
        return self._metrics.stage_seconds.labels(name).time()

    def _from_disk(self, entry: BlobEntry, buffer: memoryview) -> bool:
        if self._disk is None:
            return False
        with self._stage("disk"):
            return self._disk.read(blob_key(entry), buffer)

    def _read(self, entry: BlobEntry, buffer: memoryview) -> None:
        """Read from the store; each piece is decompressed, if needed, and hashed while the next ones arrive."""
        self._pace.take(entry.object_size)
        key = self._catalog.blob_key(entry.object_digest)
        stored = buffer if entry.stored_as is None else np.empty(entry.object_size, np.uint8).data
        verifier = Verifier(entry)
        began = time.perf_counter()
        with self._stage("store"), closing(self._catalog.store.pieces(key, stored)) as pieces:
            arriving = whole = _Timed(pieces)
            if entry.stored_as is not None:
                whole = _Timed(decode(arriving, buffer, entry))
            for piece in whole:
                verifier.update(piece)
        if entry.stored_as is not None:
            self._metrics.stage_seconds.labels("decompress").observe(whole.seconds - arriving.seconds)
        self._metrics.stage_seconds.labels("verify").observe(time.perf_counter() - began - whole.seconds)
        verifier.check()


class _Timed(Iterator[memoryview]):
    """Iterates over pieces and adds up the seconds spent waiting for them."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self.seconds = 0.0

    def __next__(self) -> memoryview:
        began = time.perf_counter()
        try:
            return next(self._pieces)
        finally:
            self.seconds += time.perf_counter() - began
