"""The way of a request on a cluster: HAProxy, and no proxy of Serve's own, in front of two routers."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from deltazip_deployments import app as building
from deltazip_ray.config import AppConfig, EngineConfig, NodeStoreConfig, RouterConfig, StoreConfig
from tests.support.catalogs import publish, save_base_files
from tests.support.fake_engine import Script
from tests.support.s3 import free_ports
from tests.support.serve_app import ServeApp, private_ray, scratch, serve_app, wait_until

K8S = Path(__file__).parents[2] / "k8s"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeApp]:
    """With the environment of the manifest's pods."""
    (service,) = [
        one for one in yaml.safe_load_all((K8S / "rayservice.yaml").read_text()) if one["kind"] == "RayService"
    ]
    (head,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    folder = tmp_path_factory.mktemp("serve")
    store = StoreConfig(url=scratch(folder, "store").as_uri())
    publish(store, folder, "one", seed=1)
    config = AppConfig(
        base=str(save_base_files(folder / "base")),
        base_name="tiny",
        store=store,
        replica_resources={"CPU": 0.5},
        engine=EngineConfig(max_model_len=512),
        node_store=NodeStoreConfig(arena_bytes=4 << 20, lease_timeout_s=2),
        router=RouterConfig(catalog_refresh_s=1),
    )
    environment = {one["name"]: one["value"] for one in head["env"]}
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    environment["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(K8S / "haproxy")
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in the image: it looks for ray
    environment["HAPROXY_HEADERS_TIMEOUT"] = "500ms"
    metrics, stats = free_ports(2)
    environment |= {"RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics), "RAY_SERVE_HAPROXY_STATS_PORT": str(stats)}
    with pytest.MonkeyPatch.context() as patch, private_ray():
        for name, value in environment.items():
            patch.setenv(name, value)
        options = building._router_options
        patch.setattr(building, "_router_options", lambda config: options(config) | {"num_replicas": 2})
        with serve_app(config, Script(step_s=0.02)) as running:
            yield running


def test_answers_streams_and_probes_come_through(app: ServeApp) -> None:
    assert httpx.get(f"{app.url}/-/healthz").status_code == 200
    asked = {"model": "one", "prompt": "abc", "max_tokens": 20}
    whole = httpx.post(f"{app.url}/v1/completions", json=asked)
    assert whole.headers["x-deltazip-version"] != "base"
    with httpx.stream("POST", f"{app.url}/v1/completions", json=asked | {"stream": True}) as stream:
        groups = [group for group in stream.iter_raw() if group]
    assert len(groups) > 5, "text comes as it is made"
    assert b"".join(groups).endswith(b"data: [DONE]\n\n")


def test_headers_that_do_not_come_are_not_waited_for(app: ServeApp) -> None:
    where = httpx.URL(app.url)
    with socket.create_connection((where.host, where.port or 80), timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        assert b" 408 " in client.recv(1000)


def test_whichever_router_is_scraped_tells_of_both(app: ServeApp) -> None:
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 1}
    before = app.samples("deltazip_router_tokens_total")
    for _ in range(8):
        httpx.post(f"{app.url}/v1/completions", json=asked).raise_for_status()
    told = [app.samples("deltazip_router_tokens_total") for _ in range(4)]
    assert told == [told[0]] * 4
    assert sum(told[0].values()) - sum(before.values()) == 8 * 4
    assert len({dict(labels)["router"] for labels in told[0]}) == 2


def test_a_request_id_may_be_any_bytes(app: ServeApp) -> None:
    answer = httpx.get(f"{app.url}/v1/models", headers=[(b"x-request-id", b"caf\xe9")])
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "café")


def test_a_client_that_leaves_ends_the_work_in_the_engine(app: ServeApp) -> None:
    asked = {"model": "one", "prompt": "abc", "max_tokens": 500}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{app.url}/v1/completions", json=asked, timeout=1.5)
    # Ten seconds of work are left: it must end long before.
    wait_until(lambda: sum(app.by_replica("fake_engine_running").values()) == 0, timeout_s=5)
