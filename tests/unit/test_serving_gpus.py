"""GPUs that this machine lacks: Serve would wait for them for ever."""

import pytest
import ray

from deltazip_deployments.serving import connect
from deltazip_ray.config import AppConfig
from deltazip_ray.errors import ConfigError


@pytest.mark.parametrize(("replicas", "share", "enough"), [(1, 1.0, True), (2, 0.5, True), (2, 1.0, False)])
def test_more_gpus_than_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, replicas: int, share: float, enough: bool
) -> None:
    for name in ("RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    settings = {"base": "/b", "store": {"url": "file:///d"}, "engine": {"device": "cuda"}}
    config = AppConfig.model_validate(settings | {"replicas": replicas, "replica_resources": {"GPU": share}})
    if enough:
        assert connect(config)
    else:
        with pytest.raises(ConfigError, match="ask for 2 GPUs, but Ray finds 1 here"):
            connect(config)
