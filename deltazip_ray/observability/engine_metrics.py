"""Metrics of an engine. Names begin with ``deltazip_engine_``; times are seconds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deltazip_ray.observability.moment import register_at_scrape

_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WAIT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine."""

    resident: frozenset[str]
    """Versions on the device."""
    loading: frozenset[str]
    running: int
    """Requests that have KV blocks."""
    waiting: int
    """Requests that wait for their delta or for KV blocks."""
    kv_blocks: int
    kv_blocks_free: int
    slots: int
    evictions: int = 0
    """Versions evicted from a slot, since the start."""
    preemptions: int = 0
    """Requests that lost their KV blocks and were computed again, since the start."""
    prefix_lookups: int = 0
    """Tokens of admitted requests, since the start."""
    prefix_hits: int = 0
    """Of those, tokens found in the prefix cache."""
    stopped: bool = False
    """Whether it has ended, on purpose or not, and accepts no more requests."""


class EngineMetrics:
    """Counters and histograms of one engine, in a registry that is passed in."""

    def __init__(self, registry: CollectorRegistry, stats: Callable[[], EngineStats]) -> None:
        """``stats`` is read at each scrape, from the thread that scrapes."""
        prefix = "deltazip_engine_"
        self.requests = Counter(f"{prefix}requests", "Requests by how they ended", ["outcome"], registry=registry)
        self.prompt_tokens = Counter(f"{prefix}prompt_tokens", "Prompt tokens accepted", registry=registry)
        self.output_tokens = Counter(f"{prefix}output_tokens", "Tokens generated", registry=registry)
        self.step_seconds = Histogram(f"{prefix}step_seconds", "One step", buckets=_STEP, registry=registry)
        self.step_rows = Histogram(f"{prefix}step_rows", "Rows of a step's batch", buckets=_COUNTS, registry=registry)
        self.step_versions = Histogram(
            f"{prefix}step_versions",
            "Versions in a step, the base is one",
            buckets=_COUNTS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            f"{prefix}first_token_seconds",
            "From arrival in the engine to the first token, by where the delta was",
            ["tier"],
            buckets=_WAIT,
            registry=registry,
        )
        self.fetch_seconds = Histogram(
            f"{prefix}fetch_seconds",
            "From the first request for a version to its verified bytes on the host",
            ["tier"],
            buckets=_WAIT,
            registry=registry,
        )
        self.load_seconds = Histogram(
            f"{prefix}load_seconds",
            "From a free slot to the delta in it",
            ["tier"],
            buckets=_WAIT,
            registry=registry,
        )
        self.start_seconds = Gauge(
            f"{prefix}start_seconds", "What the start took, by stage", ["stage"], registry=registry
        )
        self.prefetches = Counter(
            f"{prefix}prefetches", "Prefetch hints by what became of them", ["outcome"], registry=registry
        )
        self.load_failures = Counter(f"{prefix}load_failures", "Deltas that did not load", ["error"], registry=registry)
        register_at_scrape(registry, lambda: _of_the_moment(prefix, stats()))


def _of_the_moment(prefix: str, stats: EngineStats) -> Iterable[Metric]:
    gauges = {
        "resident_versions": ("Versions on the device", len(stats.resident)),
        "loading_versions": ("Versions on their way to the device", len(stats.loading)),
        "slots": ("Room for versions on the device", stats.slots),
        "running_requests": ("Requests that have KV blocks", stats.running),
        "waiting_requests": ("Requests that wait for a delta or for their turn", stats.waiting),
        "kv_blocks": ("KV blocks in all", stats.kv_blocks),
        "kv_blocks_used": ("KV blocks in use", stats.kv_blocks - stats.kv_blocks_free),
    }
    for name, (help_text, value) in gauges.items():
        yield GaugeMetricFamily(prefix + name, help_text, value)
    yield CounterMetricFamily(prefix + "evictions", "Versions that left for another one", stats.evictions)
    yield CounterMetricFamily(prefix + "preemptions", "Requests that lost their KV blocks", stats.preemptions)
    yield CounterMetricFamily(prefix + "prefix_lookup_tokens", "Tokens of admitted requests", stats.prefix_lookups)
    yield CounterMetricFamily(prefix + "prefix_hit_tokens", "Of those, found in the KV cache", stats.prefix_hits)
