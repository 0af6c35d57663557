"""Merges the metrics of all processes into one Prometheus text, with a label for each source."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deltazip_ray.observability.moment import register_at_scrape

Labels = Mapping[str, str]


def merge(sources: Iterable[tuple[Labels, str]]) -> bytes:
    """Prometheus text of all sources; the labels of a source are added to its samples.

    A family that several sources have appears once, as the format requires.
    """
    families: dict[str, Metric] = {}
    for labels, text in sources:
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.samples.append(sample._replace(labels={**sample.labels, **labels}))
    registry = CollectorRegistry()
    register_at_scrape(registry, families.values)
    return generate_latest(registry)
