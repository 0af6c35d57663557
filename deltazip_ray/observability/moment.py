"""Metrics that are read when somebody asks, not counted along the way."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class _AtScrape(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are found at the first scrape; at registration what is measured may not be built yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._families()


def register_at_scrape(registry: CollectorRegistry, families: Callable[[], Iterable[Metric]]) -> None:
    """Have ``families`` called at each scrape, from the thread that scrapes."""
    registry.register(_AtScrape(families))
