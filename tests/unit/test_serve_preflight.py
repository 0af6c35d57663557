"""``deltazip serve`` says what is missing on this host before it starts Ray."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from deltazip_deployments.preflight import check_cluster, check_host, store_problem
from deltazip_deployments.serving import root_error
from deltazip_ray.config import AppConfig, EngineConfig, NodeStoreConfig, StoreConfig
from deltazip_ray.errors import CheckpointInvalid, ConfigError
from tests.support.catalogs import publish
from tests.support.s3 import free_ports
from tests.support.tiny import make_base

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> AppConfig:
    folder = tmp_path_factory.mktemp("host")
    base = make_base(folder / "base", layers=1)
    store = StoreConfig(url=(folder / "store").as_uri())
    return AppConfig(base=str(base), store=store, node_store=NodeStoreConfig(arena_bytes=1 << 20, shm_dir=folder))


def test_a_host_that_has_all(config: AppConfig) -> None:
    check_host(config, HOST, free_ports(1)[0])


def test_a_port_that_is_taken_is_named(config: AppConfig) -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{HOST}:{port} .*--port"):
            check_host(config, HOST, port)


@pytest.mark.parametrize("port", [80_000, -1, "http"])
def test_a_port_that_is_none(config: AppConfig, port: Any) -> None:
    with pytest.raises(ConfigError, match=f"{HOST}:{port} .*--port"):
        check_host(config, HOST, port)


def test_a_base_that_is_not_there(config: AppConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="not a folder"):
        check_host(config.model_copy(update={"base": str(tmp_path / "none")}), HOST, free_ports(1)[0])


def test_a_base_without_a_tokenizer(config: AppConfig, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", layers=1)
    (base / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        check_host(config.model_copy(update={"base": str(base)}), HOST, free_ports(1)[0])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"arena_bytes": 1 << 60}, "node_store.arena_bytes"),
        ({"shm_dir": Path("/nonexistent")}, "node_store.shm_dir"),
    ],
)
def test_shared_memory_that_does_not_suffice(config: AppConfig, settings: dict[str, object], complaint: str) -> None:
    node_store = config.node_store.model_copy(update=settings)
    with pytest.raises(ConfigError, match=complaint):
        check_host(config.model_copy(update={"node_store": node_store}), HOST, free_ports(1)[0])


def test_a_gpu_that_torch_does_not_see(config: AppConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU"):
        check_host(config.model_copy(update={"engine": EngineConfig(device="cuda")}), HOST, free_ports(1)[0])


def test_a_cluster_that_does_not_answer() -> None:
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        check_cluster(f"{HOST}:{free_ports(1)[0]}")
    with socket.create_server((HOST, 0)) as other:
        check_cluster(f"{HOST}:{other.getsockname()[1]}")
    check_cluster("auto")


def test_a_store_is_told_of_until_it_has_something(tmp_path: Path) -> None:
    store = StoreConfig(url=(tmp_path / "store").as_uri())
    assert "no folder" in (store_problem(store) or "")
    (tmp_path / "store").mkdir()
    assert "deltazip publish" in (store_problem(store) or "")
    publish(store, tmp_path, "first")
    assert store_problem(store) is None


def test_of_a_replicas_trace_the_root_is_told() -> None:
    trace = (
        "RuntimeError: Traceback (most recent call last):\n"
        '  File "replica.py", line 95, in check_health\n'
        "deltazip_ray.errors.StoreUnavailable: the node store does not stay up: The actor died\n"
        "deltazip_ray.errors.ConfigError: /dev/shm has no room\n"
    )
    assert root_error(trace) == "/dev/shm has no room"
    assert root_error("somebody else's trace") == "somebody else's trace"
