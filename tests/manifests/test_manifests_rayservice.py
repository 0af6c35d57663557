"""The shipped manifests and Serve configs, checked offline: the CRD made strict, core kinds, our settings."""

import copy
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from openapi_schema_validator import OAS30Validator
from pydantic import ValidationError
from ray.serve import Application
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from deltazip_ray.config import AppConfig

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "k8s" / "rayservice.yaml"
CONFIGS = sorted((ROOT / "deployments" / "configs").glob("*.yaml"))
CRD = Path(__file__).parent / "ray.io_rayservices.yaml"
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
UNITS = {"Gi": 1 << 30, "Mi": 1 << 20}
Document = dict[str, Any]


def strict(schema: Any) -> Any:
    """The schema with unknown keys refused, wherever it names the known ones."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and "type" in schema
    if named and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


@pytest.fixture(scope="module")
def validator() -> OAS30Validator:
    crd = yaml.load(CRD.read_text(), Loader=yaml.CSafeLoader)
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    return OAS30Validator(strict(version["schema"]["openAPIV3Schema"]))


@pytest.fixture
def documents() -> list[Document]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


@pytest.fixture
def service(documents: list[Document]) -> Document:
    (found,) = [one for one in documents if one["kind"] == "RayService"]
    return copy.deepcopy(found)


def problems(validator: OAS30Validator, document: Document) -> list[str]:
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(document)]


def check_serve_config(config: Document) -> None:
    """Raise ValueError for what Serve or the application would refuse or, worse, ignore."""
    ServeDeploySchema.model_validate(config)
    unknown = set(config) - set(ServeDeploySchema.model_fields)
    for application in config["applications"]:
        unknown |= set(application) - set(ServeApplicationSchema.model_fields)
    if unknown:
        raise ValueError(f"Serve would ignore {sorted(unknown)}")
    for application in config["applications"]:
        AppConfig.model_validate(application["args"])


def pods(service: Document) -> Iterator[Document]:
    cluster = service["spec"]["rayClusterConfig"]
    yield from (group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))


def amount(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


def test_the_rayservice_is_what_the_crd_wants(validator: OAS30Validator, service: Document) -> None:
    assert problems(validator, service) == []


def test_the_core_kinds_are_what_kubernetes_wants(documents: list[Document], service: Document) -> None:
    core = [one for one in documents if one["kind"] != "RayService"]
    assert {one["kind"] for one in core} == {"ServiceAccount", "PersistentVolumeClaim", "PodDisruptionBudget"}
    core += [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod} for pod in pods(service)]
    for one in core:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def break_pod(service: Document) -> None:
    next(pods(service))["containers"][0]["imagePullPolicyy"] = "Always"


def break_type(service: Document) -> None:
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] = "two"


def break_required(service: Document) -> None:
    del service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["groupName"]


def break_key(service: Document) -> None:
    service["spec"]["serveConfig"] = {}


@pytest.mark.parametrize("damage", [break_pod, break_type, break_required, break_key])
def test_the_check_finds_mistakes(
    validator: OAS30Validator, service: Document, damage: Callable[[Document], None]
) -> None:
    damage(service)
    assert problems(validator, service)


def test_the_services_application_is_ours_and_builds(service: Document) -> None:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    check_serve_config(config)
    (application,) = config["applications"]
    module, _, builder = application["import_path"].partition(":")
    assert isinstance(getattr(importlib.import_module(module), builder)(application["args"]), Application)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_shipped_serve_configs_are_sound(path: Path) -> None:
    check_serve_config(yaml.safe_load(path.read_text()))


def test_the_serve_check_finds_mistakes(service: Document) -> None:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    for broken in (
        config | {"aplications": []},
        config | {"applications": [config["applications"][0] | {"arguments": {}}]},
        config | {"applications": [config["applications"][0] | {"args": {"base": "/x", "stores": {}}}]},
    ):
        with pytest.raises((ValueError, ValidationError)):
            check_serve_config(broken)


def test_memory_adds_up(service: Document) -> None:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    settings = AppConfig.model_validate(config["applications"][0]["args"])
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (shm,) = [
        amount(v["emptyDir"]["sizeLimit"]) for v in pod["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"
    ]
    assert settings.node_store.arena_bytes + int(group["rayStartParams"]["object-store-memory"]) < shm
    (cache,) = [amount(v["emptyDir"]["sizeLimit"]) for v in pod["volumes"] if v["name"] == "cache"]
    assert settings.node_store.disk_bytes < cache
    limits = pod["containers"][0]["resources"]["limits"]
    # Pages of /dev/shm count as the container's memory.
    assert shm < amount(limits["memory"])
    assert settings.replica_resources["GPU"] <= float(limits["nvidia.com/gpu"])
    assert settings.replica_resources["CPU"] <= float(limits["cpu"])
    assert settings.replicas <= group["maxReplicas"]


def test_a_drained_node_leaves_a_replica(service: Document, documents: list[Document]) -> None:
    (budget,) = [one["spec"] for one in documents if one["kind"] == "PodDisruptionBudget"]
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    labels = group["template"]["metadata"]["labels"]
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    assert 0 < budget["minAvailable"] < group["minReplicas"]
    (spread,) = group["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= labels.items()


def test_answers_end_before_their_cluster(service: Document) -> None:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    settings = AppConfig.model_validate(config["applications"][0]["args"])
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > settings.router.request_timeout_s


def test_every_pod_sees_the_base_and_may_read_the_store(service: Document, documents: list[Document]) -> None:
    names = {one["kind"]: one["metadata"]["name"] for one in documents}
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    base = config["applications"][0]["args"]["base"]
    for pod in pods(service):
        assert pod["serviceAccountName"] == names["ServiceAccount"]
        claims = {
            v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v
        }
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert any(
            base.startswith(f"{mounts[name]}/")
            for name, claim in claims.items()
            if claim == names["PersistentVolumeClaim"]
        )
        assert mounts["shm"] == "/dev/shm"
        ports = {port["name"] for port in container["ports"]}
        assert {
            container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        } <= ports


def test_fields_that_the_page_names_exist() -> None:
    code = " ".join(re.findall(r"`([^`\n]+)`", PAGE))
    named = set(re.findall(r"\b[a-z]+(?:[A-Z][a-z]+)+(?:V\d)?\b", code)) - {"volumeClaimTemplates"}
    assert len(named) > 10
    schema = CRD.read_text()
    assert [name for name in sorted(named) if not re.search(rf"^ +{name}:", schema, re.MULTILINE)] == []


def test_what_the_page_adds_to_the_serve_config_is_taken(service: Document) -> None:
    _, added = re.findall(r"```yaml\n(.+?)```", PAGE, re.DOTALL)
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["applications"][0] |= yaml.safe_load(added)
    ServeDeploySchema.model_validate(config)


def test_what_the_page_adds_to_the_cluster_is_taken(validator: OAS30Validator, service: Document) -> None:
    added, _ = re.findall(r"```yaml\n(.+?)```", PAGE, re.DOTALL)
    service["spec"]["rayClusterConfig"] |= yaml.safe_load(added)
    assert problems(validator, service) == []
