"""kill -9 of node store and replicas in the middle of loads: real engines, a real Ray, a slow S3 server."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from deltazip_deployments.node_store.discovery import NAMESPACE, list_stores
from deltazip_deployments.replica import make_engine
from deltazip_ray.config import AppConfig, EngineConfig, NodeStoreConfig, StoreConfig
from tests.support.chaos_app import NAMES, Models
from tests.support.engines import SETTINGS
from tests.support.fault_proxy import FaultProxy, refused, slow
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.serve_app import ServeApp, private_ray, serve_app, wait_until

LEASE_S = 2.0
LOAD_S = 3.0


@dataclass(frozen=True)
class Cluster:
    """Two replicas on one host, with one slot each, so that asking for versions in turn makes loads."""

    app: ServeApp
    proxy: FaultProxy
    models: Models
    disk: Path

    def ask(self, model: str) -> httpx.Response:
        asked = {"model": model, "prompt": "abc", "max_tokens": 3, "temperature": 0}
        return httpx.post(f"{self.app.url}/v1/completions", json=asked, timeout=60)

    def store(self) -> Any:
        """The node store's actor."""
        (name,) = list_stores("deltazip")
        return ray.get_actor(name, namespace=NAMESPACE)

    def kill_store(self) -> int:
        """The process id that it had."""
        pid = int(ray.get(self.store().arena.remote(), timeout=30).pid)
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill_replica(self, replica: str) -> None:
        """``replica`` as metrics call it."""
        handle = ray.get_actor(f"SERVE_REPLICA::deltazip#replica#{replica}", namespace="serve")
        os.kill(ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=30), signal.SIGKILL)

    def gauge(self, name: str) -> dict[str, float]:
        """One of the engines' gauges by replica."""
        return self.app.by_replica(f"deltazip_engine_{name}")

    def held_bytes(self) -> float:
        samples = self.app.samples("deltazip_host_bytes")
        return sum(value for labels, value in samples.items() if ("state", "held") in labels)

    def wait_until_idle(self) -> None:
        """Both replicas are there, healthy by their engines' own checks, and nothing is held or under way."""
        wait_until(lambda: httpx.get(f"{self.app.url}/health", timeout=10).json()["status"] == "ok")
        wait_until(lambda: len(self.gauge("slots")) == 2, 60)
        wait_until(lambda: self.held_bytes() == 0)
        wait_until(lambda: not any(self.gauge("loading_versions").values()))
        wait_until(lambda: not any(self.gauge("kv_blocks_used").values()))

    @contextmanager
    def loading(self, model: str) -> Iterator["Future[httpx.Response]"]:
        """The first request for a model, while its delta is on its way."""
        digest = self.models.blob(model)
        self.proxy.inject(slow(LOAD_S), digest)
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(self.ask, model)
            wait_until(lambda: self.proxy.count(digest) > 0)
            yield answer
            self.proxy.heal()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server, models: Models) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("processes")
    with FaultProxy(s3_server.ports["proxy"]) as proxy, private_ray(), pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        store = StoreConfig(url=f"s3://{models.publish(s3_server)}", endpoint_url=proxy.endpoint, path_style=True)
        config = AppConfig(
            base=str(models.base),
            base_name="tiny",
            store=store,
            replicas=2,
            replica_resources={"CPU": 0.5},
            engine=EngineConfig(**SETTINGS | {"slots": 1}),
            node_store=NodeStoreConfig(arena_bytes=4 << 20, lease_timeout_s=LEASE_S, disk_dir=folder / "disk"),
        )
        with serve_app(config, make_engine) as app:
            yield Cluster(app, proxy, models, folder / "disk")


def test_loads_that_wait_keep_nobody_else_waiting(cluster: Cluster) -> None:
    unknown = "0" * 64
    cluster.proxy.inject(slow(LOAD_S), unknown)
    store = cluster.store()
    waiting = [store.acquire.remote("crowd", unknown) for _ in range(1100)]
    wait_until(lambda: cluster.proxy.count(unknown) > 0)
    began = time.monotonic()
    ray.get(store.heartbeat.remote("crowd", ""))
    assert time.monotonic() - began < LOAD_S / 2
    cluster.kill_store()
    for call in waiting:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(call)
    cluster.proxy.heal()


def test_a_node_store_that_is_killed_during_a_load_is_replaced_and_the_load_goes_on(cluster: Cluster) -> None:
    assert cluster.ask("warm").status_code == 200
    wait_until(lambda: len(list(cluster.disk.glob("*-*"))) == 1 + len(cluster.models.versions["warm"].blobs))
    with cluster.loading("sick") as answer:
        before = cluster.kill_store()
        assert cluster.ask("tiny").status_code == 200
    assert answer.result().status_code == 200, answer.result().text
    # What the old one had kept on disk is not fetched again.
    for model in ("warm", "sick", "warm", "sick"):
        assert cluster.ask(model).status_code == 200
    assert cluster.proxy.count(cluster.models.blob("warm")) == 1
    assert cluster.kill_store() != before
    cluster.wait_until_idle()


def test_a_replica_that_is_killed_during_a_load_is_replaced_and_the_request_moves_on(cluster: Cluster) -> None:
    with cluster.loading("cold") as answer:
        wait_until(lambda: any(cluster.gauge("loading_versions").values()))
        (victim,) = [replica for replica, loading in cluster.gauge("loading_versions").items() if loading]
        cluster.kill_replica(victim)
    assert answer.result().status_code == 200, answer.result().text
    wait_until(lambda: victim not in cluster.gauge("slots"))
    cluster.wait_until_idle()


def test_while_everything_is_killed_everybody_is_answered_and_rightly(cluster: Cluster) -> None:
    models = (*NAMES, "tiny")
    right = {model: cluster.ask(model).json()["choices"][0]["text"] for model in models}
    until = time.monotonic() + 9

    def client(model: str) -> list[httpx.Response]:
        answers = []
        while time.monotonic() < until:
            answers.append(cluster.ask(model))
        return answers

    with ThreadPoolExecutor() as pool:
        clients = {model: pool.submit(client, model) for model in models}
        for replica in cluster.gauge("slots"):
            time.sleep(1)
            shutil.rmtree(cluster.disk, ignore_errors=True)
            cluster.kill_store()
            time.sleep(1)
            cluster.kill_replica(replica)
    for model, done in clients.items():
        for answer in done.result():
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == right[model]
            else:
                assert int(answer.headers["retry-after"]) > 0
        assert done.result()[-1].status_code == 200
    cluster.wait_until_idle()


def test_no_log_shows_what_a_server_says_of_credentials(cluster: Cluster) -> None:
    quoted = f"{ACCESS_KEY} and {SECRET_KEY} do not fit Signature=0123456789abcdef"
    for model in NAMES:
        cluster.proxy.inject(refused(403, "SignatureDoesNotMatch", message=quoted), cluster.models.blob(model))
    shutil.rmtree(cluster.disk, ignore_errors=True)
    cluster.kill_store()
    statuses = {cluster.ask(model).status_code for model in NAMES * 2}
    cluster.proxy.heal()
    assert 503 in statuses
    logs = [path for path in Path(os.environ["RAY_TMPDIR"]).rglob("logs/**/*") if path.is_file()]
    assert any(b"SignatureDoesNotMatch" in path.read_bytes() for path in logs)
    for path in logs:
        assert ACCESS_KEY.encode() not in path.read_bytes(), path.name
        assert b"Signature=" not in path.read_bytes(), path.name
