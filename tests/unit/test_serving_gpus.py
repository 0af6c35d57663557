"""GPUs that a machine lacks, Serve would wait for for ever; those of a cluster may come."""

import logging
import os

import pytest
import ray
from ray._private import ray_constants

from deltazip_deployments.serving import connect
from deltazip_ray.config import AppConfig
from deltazip_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # What connecting changes is put back.
    for name in ("RAY_USAGE_STATS_ENABLED", ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})


def on_cuda(replicas: int, share: float) -> AppConfig:
    settings = {"base": "/b", "store": {"url": "file:///d"}, "engine": {"device": "cuda"}}
    return AppConfig.model_validate(settings | {"replicas": replicas, "replica_resources": {"GPU": share}})


@pytest.mark.parametrize(("replicas", "share"), [(1, 1.0), (2, 0.5)])
def test_enough(replicas: int, share: float) -> None:
    connect(on_cuda(replicas, share))


def test_too_few_on_this_machine() -> None:
    with pytest.raises(ConfigError, match="ask for 2 GPUs, but Ray finds 1: "):
        connect(on_cuda(2, 1.0))


def test_too_few_in_a_cluster_yet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with caplog.at_level(logging.WARNING):
        connect(on_cuda(2, 1.0))
    assert "Ray finds 1: waiting" in caplog.text
