"""Metrics that are computed at each scrape instead of being counted."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class _AtScrape(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        """No names, which the registry would ask for at once: what is measured may not exist yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._families()


def register_at_scrape(registry: CollectorRegistry, families: Callable[[], Iterable[Metric]]) -> None:
    """Call ``families`` at each scrape, from the thread that scrapes."""
    registry.register(_AtScrape(families))
