"""Settings are frozen, refuse unknown keys and say which."""

import pytest
from pydantic import ValidationError

from deltazip_ray.config import AppConfig, EngineConfig, StoreConfig


def test_config_minimal_has_usable_defaults() -> None:
    config = AppConfig.model_validate({"base": "/models/base", "store": {"url": "file:///deltas"}})
    assert config.engine.slots >= 1
    assert config.base_name == "base"


def test_config_refuses_unknown_keys_at_any_depth() -> None:
    with pytest.raises(ValidationError, match="slotz"):
        AppConfig.model_validate({"base": "/b", "store": {"url": "file:///d"}, "engine": {"slotz": 3}})


def test_config_is_frozen() -> None:
    config = StoreConfig(url="file:///d")
    with pytest.raises(ValidationError, match="frozen"):
        config.url = "file:///e"  # type: ignore[misc]


@pytest.mark.parametrize("url", ["/plain/path", "http://host/x", "s3://", "file:", ""])
def test_config_refuses_urls_it_cannot_open(url: str) -> None:
    with pytest.raises(ValidationError, match="must be file:///path or s3://bucket/prefix"):
        StoreConfig(url=url)


CUDA = {"base": "/b", "store": {"url": "file:///d"}, "engine": {"device": "cuda"}}


def test_a_replica_on_cuda_gets_a_gpu_or_the_share_it_asks_for() -> None:
    assert AppConfig.model_validate(CUDA).resources == {"CPU": 1.0, "GPU": 1.0}
    assert AppConfig.model_validate(CUDA | {"replica_resources": {"GPU": 0.5}}).resources == {"GPU": 0.5}
    assert "GPU" not in AppConfig.model_validate(CUDA | {"engine": {}}).resources


def test_more_slots_that_stay_than_there_are_is_refused() -> None:
    with pytest.raises(ValidationError, match="slots_min is 3, but there are 2 slots"):
        EngineConfig(slots=2, slots_min=3)


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"replica_resources\.GPU"):
        AppConfig.model_validate(CUDA | {"replica_resources": {"CPU": 1, "GPU": 0}})
