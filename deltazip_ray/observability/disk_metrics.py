"""Metrics of the disk tier. Names begin with ``deltazip_disk_``."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deltazip_ray.observability.moment import register_at_scrape


@dataclass(frozen=True)
class DiskStats:
    """A snapshot of a disk tier."""

    bytes: int
    files: int
    """Blobs and manifests."""
    evictions: int
    """Files that left to make room, since the start."""


class DiskMetrics:
    """Counters of one disk tier, in a registry that is passed in."""

    def __init__(self, registry: CollectorRegistry, stats: Callable[[], DiskStats]) -> None:
        """``stats`` is read at each scrape, from the thread that scrapes."""
        prefix = "deltazip_disk_"
        self.damaged = Counter(f"{prefix}damaged", "Files that were damaged", registry=registry)
        self.skipped = Counter(
            f"{prefix}skipped",
            "Blobs and manifests that were not kept: no room, too late or a pause",
            registry=registry,
        )
        self.failures = Counter(
            f"{prefix}failures", "Operations that the disk refused", ["operation"], registry=registry
        )
        register_at_scrape(registry, lambda: _of_the_moment(prefix, stats()))


def _of_the_moment(prefix: str, stats: DiskStats) -> Iterable[Metric]:
    yield GaugeMetricFamily(prefix + "bytes", "Bytes of blobs and manifests", stats.bytes)
    yield GaugeMetricFamily(prefix + "files", "Blobs and manifests on the disk", stats.files)
    yield CounterMetricFamily(prefix + "evictions", "Files that left to make room", stats.evictions)
