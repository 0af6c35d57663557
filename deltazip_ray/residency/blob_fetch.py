"""One blob from the disk or the store into a given place in memory, verified. Runs in a thread."""

import time

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.digests import verify_blob
from deltazip_ray.artifact.manifest import BlobEntry
from deltazip_ray.errors import BlobCorrupt
from deltazip_ray.observability.host_metrics import HostMetrics
from deltazip_ray.residency.disk_tier import DiskTier
from deltazip_ray.residency.quarantine import blob_key
from deltazip_ray.residency.tiers import Tier


class BlobFetcher:
    """Brings blobs from where they are nearest."""

    def __init__(self, catalog: Catalog, disk: DiskTier | None, metrics: HostMetrics) -> None:
        self._catalog = catalog
        self._disk = disk
        self._metrics = metrics

    def __call__(self, entry: BlobEntry, buffer: memoryview) -> Tier:
        """Fill ``buffer``, of ``entry.size`` bytes, with the blob and check its sha256; returns where it was.

        What came from the store is offered to the disk, which may read ``buffer`` later. Damaged bytes are fetched
        once more, as they may have been damaged on their way. Raises BlobCorrupt when they come damaged again,
        ObjectNotFound and StoreUnavailable at once: the store has made its own attempts.
        """
        began = time.perf_counter()
        tier: Tier = "disk"
        if self._disk is None or not self._disk.read(blob_key(entry), buffer):
            tier = "remote"
            try:
                self._read(entry, buffer)
            except BlobCorrupt:
                self._metrics.refetches.inc()
                self._read(entry, buffer)
            if self._disk is not None:
                self._disk.offer(blob_key(entry), buffer)
        self._metrics.fetch_seconds.labels(tier).observe(time.perf_counter() - began)
        self._metrics.fetched_bytes.labels(tier).inc(entry.size)
        return tier

    def _read(self, entry: BlobEntry, buffer: memoryview) -> None:
        self._catalog.store.read_into(self._catalog.blob_key(entry.digest), buffer)
        verify_blob(buffer, entry)
