"""One scrape of many sources."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deltazip_deployments.router.scrape import merge


def replica_text(tokens: int) -> str:
    registry = CollectorRegistry()
    Counter("made_tokens", "Tokens made", ("kind",), registry=registry).labels('a b"c').inc(tokens)
    Histogram("step_seconds", "A step", buckets=(0.1, 1), registry=registry).observe(0.5)
    Gauge("free", "Free", registry=registry).set(float("inf"))
    return generate_latest(registry).decode()


def test_sources_are_told_apart_and_families_appear_once() -> None:
    text = merge(
        [({"replica": "r1"}, replica_text(3)), ({"replica": "r2", "node": "n"}, replica_text(4)), ({}, "")]
    ).decode()
    assert text.count("# TYPE made_tokens_total counter") == 1
    assert text.count("# TYPE step_seconds histogram") == 1
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    tokens = {sample.labels["replica"]: sample.value for sample in samples if sample.name == "made_tokens_total"}
    assert tokens == {"r1": 3, "r2": 4}
    buckets = {(s.labels["replica"], s.labels["le"]): s.value for s in samples if s.name == "step_seconds_bucket"}
    assert buckets["r2", "1.0"] == 1
    assert buckets["r1", "0.1"] == 0


def test_the_sources_labels_win() -> None:
    registry = CollectorRegistry()
    Gauge("x", "X", ("replica",), registry=registry).labels("forged").set(1)
    text = merge([({"replica": "true"}, generate_latest(registry).decode())]).decode()
    assert 'x{replica="true"} 1.0' in text
    assert "forged" not in text
