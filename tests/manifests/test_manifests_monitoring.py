"""Dashboard and alerts ask for metrics and labels that there are."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from deltazip_deployments.router.metrics import RouterMetrics
from deltazip_ray.observability.disk_metrics import DiskMetrics, DiskStats
from deltazip_ray.observability.engine_metrics import EngineMetrics, EngineStats
from deltazip_ray.observability.host_metrics import HostMetrics, HostStats

FOLDER = Path(__file__).parents[2] / "k8s" / "monitoring"
SERVICE = FOLDER.parent / "rayservice.yaml"
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}
ADDED = {"le", "node", "replica", "router"}
"""By the histograms, and by the router to what others tell."""
SELECTED = re.compile(r"(deltazip_\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"by \(([^)]*)\)")


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "prometheus.yaml").read_text()))


def alerts() -> list[dict[str, Any]]:
    (rule,) = [one for one in documents() if one["kind"] == "PrometheusRule"]
    return [alert for group in rule["spec"]["groups"] for alert in group["rules"]]


def expressions() -> Iterator[str]:
    yield from (alert["expr"] for alert in alerts())
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ()))


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """The labels of each sample that a scrape may have."""
    registry = CollectorRegistry()
    none = frozenset[str]()
    router = RouterMetrics()
    told = [
        router,
        EngineMetrics(registry, lambda: EngineStats(none, none, 0, 0, 1, 1, 1)),
        HostMetrics(registry, lambda: HostStats(1, 1, 0, 0, 0, 0, 0)),
        DiskMetrics(registry, lambda: DiskStats(0, 0, 0)),
    ]
    labels = {}
    for metric in [value for one in told for value in vars(one).values() if isinstance(value, MetricWrapperBase)]:
        labels[metric._name] = set(metric._labelnames)
    found = {}
    for family in [*router.registry.collect(), *registry.collect()]:
        own = labels.get(family.name, {name for sample in family.samples for name in sample.labels})
        found |= {family.name + suffix: own | ADDED for suffix in SUFFIXES[family.type]}
    return found


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_what_is_asked_for_exists(known: dict[str, set[str]], expression: str) -> None:
    selected = SELECTED.findall(expression)
    assert selected
    for name, matchers in selected:
        assert name in known
        wanted = {matcher.split("=")[0].rstrip("!~ ") for matcher in matchers.split(",") if matcher}
        assert wanted <= known[name]
    for group in GROUPED.findall(expression):
        assert {label.strip() for label in group.split(",")} <= set.intersection(*(known[name] for name, _ in selected))


def test_metrics_that_pages_name_exist(known: dict[str, set[str]]) -> None:
    there = known.keys() | {re.sub("_(bucket|sum|count)$", "", name) for name in known}
    text = "\n".join(page.read_text() for page in (FOLDER.parents[1] / "docs").rglob("*.md"))
    named = set(re.findall(r"`(deltazip_(?:engine|host|disk|router)_\w+)", text))
    assert len(named) > 20
    assert named - there == set()


def test_every_alert_is_explained() -> None:
    page = (FOLDER.parents[1] / "docs" / "kubernetes.md").read_text()
    assert [alert["alert"] for alert in alerts() if f"`{alert['alert']}`" not in page] == []


def test_the_alert_knows_how_many_replicas_there_are_to_be() -> None:
    (service,) = [one for one in yaml.safe_load_all(SERVICE.read_text()) if one["kind"] == "RayService"]
    replicas = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["replicas"]
    (alert,) = [one for one in alerts() if one["alert"] == "DeltazipReplicasMissing"]
    assert alert["expr"].endswith(f"< {replicas}")


def test_the_ports_that_are_scraped_are_those_of_the_pods() -> None:
    (service,) = [one for one in yaml.safe_load_all(SERVICE.read_text()) if one["kind"] == "RayService"]
    cluster = service["spec"]["rayClusterConfig"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    monitors = [one["spec"]["podMetricsEndpoints"] for one in documents() if one["kind"] == "PodMonitor"]
    scraped = {endpoint["port"] for endpoints in monitors for endpoint in endpoints}
    for pod in pods:
        assert scraped <= {port["name"] for port in pod["containers"][0]["ports"]}
