"""Metrics of the host tier. Names begin with ``deltazip_host_``; times are seconds, sizes bytes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deltazip_ray.observability.moment import register_at_scrape

_FETCH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass(frozen=True)
class HostStats:
    """A snapshot of a host arena. ``free + cached + held = arena``, in bytes, each blob counted in whole pages."""

    arena_bytes: int
    free_bytes: int
    cached_bytes: int
    """Verified and not held, so that they may be evicted."""
    held_bytes: int
    """In use or being fetched."""
    blobs: int
    fetching: int
    """Blobs being fetched."""
    evictions: int
    """Blobs evicted since the start."""
    open_breakers: int = 0
    """Versions that keep failing and get their last error without an attempt."""
    refusals: int = 0
    """Such errors, since the start."""
    quarantined: int = 0
    """Blobs that arrived damaged twice and are not fetched for a while."""
    quarantines: int = 0
    """Blobs put into quarantine since the start."""


class HostMetrics:
    """Counters and histograms of one host cache, in a registry that is passed in."""

    def __init__(self, registry: CollectorRegistry, stats: Callable[[], HostStats]) -> None:
        """``stats`` is read at each scrape, from the thread that scrapes."""
        prefix = "deltazip_host_"
        self.acquires = Counter(
            f"{prefix}acquires", "Versions acquired, by where their slowest blob was", ["tier"], registry=registry
        )
        self.failures = Counter(f"{prefix}failures", "Acquires that failed", ["error"], registry=registry)
        self.fetch_seconds = Histogram(
            f"{prefix}fetch_seconds",
            "To bring and verify one blob, by where it was",
            ["tier"],
            buckets=_FETCH,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            f"{prefix}stage_seconds",
            "Of one blob: queue, then disk, or store, decompress (if it is stored so) and verify",
            ["stage"],
            buckets=_FETCH,
            registry=registry,
        )
        self.fetched_bytes = Counter(
            f"{prefix}fetched_bytes", "Brought and verified, by where it was", ["tier"], registry=registry
        )
        self.refetches = Counter(
            f"{prefix}refetches", "Blobs that came damaged and were fetched again", registry=registry
        )
        register_at_scrape(registry, lambda: _of_the_moment(prefix, stats()))


def _of_the_moment(prefix: str, stats: HostStats) -> Iterable[Metric]:
    by_state = GaugeMetricFamily(prefix + "bytes", "Bytes of the arena by state", labels=["state"])
    by_state.add_metric(["free"], stats.free_bytes)
    by_state.add_metric(["cached"], stats.cached_bytes)
    by_state.add_metric(["held"], stats.held_bytes)
    yield by_state
    gauges = {
        "blobs": ("Blobs in the arena or on their way", stats.blobs),
        "fetching_blobs": ("Blobs on their way", stats.fetching),
        "open_breakers": ("Versions that fail and are answered without a try", stats.open_breakers),
        "quarantined_blobs": ("Blobs that came damaged twice and are not fetched now", stats.quarantined),
    }
    for name, (help_text, value) in gauges.items():
        yield GaugeMetricFamily(prefix + name, help_text, value)
    counters = {
        "evictions": ("Blobs that left to make room", stats.evictions),
        "refusals": ("Acquires that were answered by an open breaker", stats.refusals),
        "quarantines": ("Blobs that came damaged twice", stats.quarantines),
    }
    for name, (help_text, value) in counters.items():
        yield CounterMetricFamily(prefix + name, help_text, value)
