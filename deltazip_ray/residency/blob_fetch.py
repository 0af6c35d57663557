"""One blob from the store into a given place in memory, verified. Runs in a thread."""

import time

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.digests import verify_blob
from deltazip_ray.artifact.manifest import BlobEntry
from deltazip_ray.errors import BlobCorrupt
from deltazip_ray.observability.host_metrics import HostMetrics
from deltazip_ray.residency.tiers import Tier


def fetch_blob(catalog: Catalog, metrics: HostMetrics, entry: BlobEntry, buffer: memoryview) -> Tier:
    """Fill ``buffer``, of ``entry.size`` bytes, with the blob and check its sha256.

    Damaged bytes are fetched once more, as they may have been damaged on their way. Raises BlobCorrupt when they
    come damaged again, ObjectNotFound and StoreUnavailable at once: the store has made its own attempts.
    """
    began = time.perf_counter()
    try:
        _read(catalog, entry, buffer)
    except BlobCorrupt:
        metrics.refetches.inc()
        _read(catalog, entry, buffer)
    metrics.fetch_seconds.observe(time.perf_counter() - began)
    metrics.fetched_bytes.inc(entry.size)
    return "remote"


def _read(catalog: Catalog, entry: BlobEntry, buffer: memoryview) -> None:
    catalog.store.read_into(catalog.blob_key(entry.digest), buffer)
    verify_blob(buffer, entry)
