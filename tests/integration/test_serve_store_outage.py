"""The router and a store that is away: at the start, and in the middle. With a real S3 server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltazip_ray.config import AppConfig, RouterConfig, StoreConfig
from tests.support.catalogs import publish, save_base_files
from tests.support.fake_engine import Script
from tests.support.router_app import RouterApp, router_app
from tests.support.s3 import S3Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server of our own, for we stop it."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def config(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AppConfig:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    store = StoreConfig(
        url=f"s3://{server.new_bucket()}/models",
        endpoint_url=server.endpoint,
        path_style=True,
        timeout_s=2,
        max_attempts=1,
    )
    publish(store, tmp_path, "one", seed=1)
    base = save_base_files(tmp_path / "base")
    return AppConfig(base=str(base), base_name="tiny", store=store, router=RouterConfig(catalog_refresh_s=0.2))


async def status_of(app: RouterApp, model: str) -> int:
    return (await app.client.post("/v1/completions", json={"model": model, "prompt": "a"})).status_code


async def wait_for_health(app: RouterApp, status: str) -> None:
    for _ in range(400):
        if (await app.client.get("/health")).json()["status"] == status:
            return
        await asyncio.sleep(0.05)
    raise TimeoutError(f"the router was not {status} within 20 s")


async def test_the_router_comes_up_without_a_store_and_recovers(config: AppConfig, server: S3Server) -> None:
    server.kill()
    async with router_app(config, Script(), Path(config.base)) as app:
        health = await app.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        refused = await app.client.post("/v1/completions", json={"model": "one", "prompt": "a"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "store_unavailable"
        assert health.json()["problems"][0] in refused.json()["error"]["message"]
        assert (await app.client.get("/v1/models")).status_code == 503
        assert await status_of(app, "tiny") == 200
        server.start()
        await wait_for_health(app, "ok")
        assert await status_of(app, "one") == 200


async def test_known_variants_are_served_while_the_store_is_away(config: AppConfig, server: S3Server) -> None:
    async with router_app(config, Script(), Path(config.base)) as app:
        assert await status_of(app, "one") == 200
        server.kill()
        await wait_for_health(app, "degraded")
        assert await status_of(app, "one") == 200
        assert await status_of(app, "unheard-of") == 404
        assert len((await app.client.get("/v1/models")).json()["data"]) == 2
        server.start()
        await wait_for_health(app, "ok")
