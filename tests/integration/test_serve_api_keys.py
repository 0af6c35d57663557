"""API keys at the router: who gets in, and to which variants."""

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deltazip_deployments.router.keys import ApiKeys
from deltazip_ray.config import AppConfig, RouterConfig, StoreConfig
from deltazip_ray.errors import ConfigError, InvalidKey
from tests.support.catalogs import publish, save_base_files
from tests.support.fake_engine import Script
from tests.support.router_app import router_app


def write_keys(file: Path, keys: dict[str, list[str]]) -> Path:
    """``keys`` by their plain text; replaced as an editor or a mounted secret would be."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps({hashlib.sha256(key.encode()).hexdigest(): names for key, names in keys.items()}))
    return new.replace(file)


@pytest.fixture
def config(tmp_path: Path) -> AppConfig:
    (tmp_path / "store").mkdir()
    config = AppConfig(
        base=str(save_base_files(tmp_path / "base")),
        store=StoreConfig(url=(tmp_path / "store").as_uri()),
        router=RouterConfig(
            catalog_refresh_s=60,
            api_keys_file=write_keys(tmp_path / "keys.json", {"sk-all": ["*"], "sk-one": ["one", "base"]}),
        ),
    )
    for name in ("one", "two"):
        publish(config.store, tmp_path, name, seed=1, aliases=("latest", "prod"))
    return config


def asked(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": "a", "max_tokens": 2}


async def test_a_key_opens_what_it_is_for(config: AppConfig) -> None:
    async with router_app(config, Script(), Path(config.base)) as app:

        async def post(key: str | None, model: str) -> httpx.Response:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return await app.client.post("/v1/completions", json=asked(model), headers=headers)

        for key, model, status in (
            ("sk-all", "two@prod", 200),
            ("sk-all", "base", 200),
            ("sk-one", "one", 200),
            ("sk-one", "one@prod", 200),
            ("sk-one", "base", 200),
            ("sk-one", "two", 403),
            ("sk-one", "two@prod", 403),
            ("sk-one", "none", 403),
            ("sk-on", "one", 401),
            (None, "one", 401),
        ):
            response = await post(key, model)
            assert response.status_code == status, (key, model, response.text)
            if status != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers["www-authenticate"] == "Bearer"
        assert len(app.backend.requests) == 5
        assert (await app.client.get("/health")).status_code == 200
        assert (await app.client.get("/metrics")).status_code == 200


async def test_models_are_those_of_the_key(config: AppConfig) -> None:
    async with router_app(config, Script(), Path(config.base)) as app:
        for key, names in (
            ("sk-all", {"base", "one", "one@prod", "two", "two@prod"}),
            ("sk-one", {"base", "one", "one@prod"}),
        ):
            headers = {"authorization": f"Bearer {key}"}
            listed = (await app.client.get("/v1/models", headers=headers)).json()
            assert {entry["id"] for entry in listed["data"]} == names
        assert (await app.client.get("/v1/models/two", headers=headers)).status_code == 403
        assert (await app.client.get("/v1/models")).status_code == 401


async def test_the_client_raises_its_own_errors(config: AppConfig) -> None:
    async with router_app(config, Script(), Path(config.base)) as app:
        http = httpx.AsyncClient(transport=app.client._transport)
        async with openai.AsyncOpenAI(
            base_url="http://router/v1", api_key="sk-x", max_retries=0, http_client=http
        ) as client:
            with pytest.raises(openai.AuthenticationError, match="unknown API key"):
                await client.completions.create(**asked("one"))
            client.api_key = "sk-one"
            with pytest.raises(openai.PermissionDeniedError, match="'two'"):
                await client.completions.create(**asked("two"))
            assert (await client.completions.create(**asked("one"))).choices[0].text


async def test_keys_change_without_a_restart_and_survive_a_broken_file(
    config: AppConfig, caplog: pytest.LogCaptureFixture
) -> None:
    file = config.router.api_keys_file
    assert file is not None
    keys = ApiKeys(file)
    assert keys.grant("Bearer sk-one").allows("one")
    write_keys(file, {"sk-new": ["two"]})
    assert keys.grant("bearer  sk-new").names == {"two"}
    with pytest.raises(InvalidKey):
        keys.grant("Bearer sk-one")
    file.write_text("{")
    assert keys.grant("Bearer sk-new").names == {"two"}
    file.unlink()
    assert keys.grant("Bearer sk-new").names == {"two"}
    assert "stay as they were" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", '{"sk-plain": ["*"]}', '{"' + "a" * 64 + '": "*"}'])
def test_a_file_that_is_none_stops_the_router_and_is_not_quoted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="api_keys_file") as refused:
        ApiKeys(file)
    assert "sk-plain" not in refused.value.message
    with pytest.raises(ConfigError, match="api_keys_file"):
        ApiKeys(tmp_path / "none.json")
