"""Two Ray nodes on this machine: a node store each, one version on both, and the death of a node."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from deltazip_deployments import serving
from deltazip_deployments.node_store.discovery import list_stores
from deltazip_ray.config import AppConfig, EngineConfig, NodeStoreConfig, StoreConfig
from tests.support.catalogs import publish, save_base_files
from tests.support.fake_engine import Script, scripted_tokens
from tests.support.s3 import free_ports
from tests.support.serve_app import ServeApp, private_ray, scratch, wait_until
from tests.support.tiny import make_tokenizer

TOKENIZER = make_tokenizer().backend_tokenizer


@dataclass(frozen=True)
class TwoNodes:
    """An application with a replica on each of two nodes; the proxy and the router are on the head."""

    app: ServeApp
    cluster: Cluster
    version: str
    folder: Path
    store: StoreConfig


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("nodes")
    store = StoreConfig(url=scratch(folder, "store").as_uri())
    version = publish(store, folder, "v0", size=5000)
    config = AppConfig(
        base=str(save_base_files(folder / "base")),
        base_name="tiny",
        store=store,
        replicas=2,
        replica_resources={"CPU": 1, "replica_slot": 1},
        engine=EngineConfig(max_model_len=512, slots=2, max_running=2),
        node_store=NodeStoreConfig(arena_bytes=4 << 20, lease_timeout_s=5),
    )
    with private_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        # A resource of its own keeps each node to one replica.
        node = {"num_cpus": 2, "resources": {"replica_slot": 1}, "object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            ray.init(address=cluster.address, log_to_driver=False)
            with ThreadPoolExecutor() as pool:
                port = free_ports(1)[0]
                starting = pool.submit(serving.deploy, config, port=port, engine_factory=Script(step_s=0.03))
                # The router takes its place on the head: its node must outlive the other one here.
                wait_until(lambda: any("#router#" in actor["name"] for actor in _named_actors()), timeout_s=120)
                cluster.add_node(**node)
                url = starting.result(timeout=180)
            yield TwoNodes(ServeApp(url), cluster, version, folder, store)
            serving.stop(owns_ray=False)
        finally:
            ray.shutdown()
            cluster.shutdown()


def _named_actors() -> list[dict[str, str]]:
    return ray.util.list_named_actors(all_namespaces=True)


def text_of(version: str, prompt: str, count: int) -> str:
    return TOKENIZER.decode(scripted_tokens(version, tuple(TOKENIZER.encode(prompt).ids), count))


async def test_a_version_that_is_wanted_much_is_on_both_nodes(nodes: TwoNodes) -> None:
    async with httpx.AsyncClient(base_url=nodes.app.url, timeout=60) as client:

        async def ask(i: int) -> None:
            asked = {"model": "v0", "prompt": f"p{i}", "max_tokens": 20}
            answer = await client.post("/v1/completions", json=asked)
            assert answer.json()["choices"][0]["text"] == text_of(nodes.version, f"p{i}", 20)

        # Far more than one replica's batch: the queue there comes to cost more than loading on the other.
        await asyncio.gather(*(ask(i) for i in range(16)))
    assert len(list_stores("deltazip")) == 2
    wait_until(lambda: len(nodes.app.by_replica("fake_engine_tokens_total")) == 2)
    wait_until(lambda: min(nodes.app.by_replica("fake_engine_tokens_total").values()) > 0)
    loads = {dict(labels)["node"]: n for labels, n in nodes.app.samples("deltazip_host_acquires_total").items()}
    assert len(loads) == 2
    assert set(loads.values()) == {1.0}
    where = {dict(labels)["replica"]: dict(labels)["node"] for labels in nodes.app.samples("fake_engine_running")}
    assert set(where.values()) == set(loads)


async def test_a_version_that_becomes_hot_is_fetched_where_it_will_go_before_it_goes_there(nodes: TwoNodes) -> None:
    publish(nodes.store, nodes.folder, "hot", seed=1, size=5000)

    def acquires() -> float:
        return sum(nodes.app.samples("deltazip_host_acquires_total").values())

    async with httpx.AsyncClient(base_url=nodes.app.url, timeout=60) as client:

        async def ask(count: int) -> int:
            asked = {"model": "hot", "prompt": "p", "max_tokens": count}
            return (await client.post("/v1/completions", json=asked)).status_code

        while await ask(1) == 404:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        before = acquires()
        # Too few to be sent away: waiting behind the two that run costs half of what loading on the other node does.
        first = [asyncio.create_task(ask(60)) for _ in range(3)]
        await asyncio.sleep(0.5)
        assert await asyncio.gather(ask(60), *first) == [200] * 4
    wait_until(lambda: acquires() == before + 1)


async def test_streams_survive_the_death_of_a_node(nodes: TwoNodes) -> None:
    async with httpx.AsyncClient(base_url=nodes.app.url, timeout=60) as client:

        async def ask(i: int) -> str:
            text = ""
            asked = {"model": "v0", "prompt": f"q{i}", "max_tokens": 120, "stream": True}
            async with client.stream("POST", "/v1/completions", json=asked) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        assert "error" not in event, event
                        text += event["choices"][0]["text"]
            return text

        streams = [asyncio.create_task(ask(i)) for i in range(4)]
        await asyncio.to_thread(wait_until, lambda: min(nodes.app.by_replica("fake_engine_running").values()) >= 1, 10)
        (worker,) = [node for node in nodes.cluster.list_all_nodes() if not node.head]
        await asyncio.to_thread(nodes.cluster.remove_node, worker, False)
        assert await asyncio.gather(*streams) == [text_of(nodes.version, f"q{i}", 120) for i in range(4)]


def test_nothing_is_left_on_disk(nodes: TwoNodes) -> None:
    assert not list(Path("/dev/shm").glob("deltazip-*"))
