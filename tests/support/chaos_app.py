"""Router, engine and host tier in one process, with an S3 server behind a proxy that injects faults."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry

from deltazip_deployments.router.api import build_api
from deltazip_deployments.router.metrics import RouterMetrics
from deltazip_deployments.router.scrape import Labels
from deltazip_deployments.router.service import RouterService
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import AppConfig, BreakerConfig, EngineConfig, NodeStoreConfig, RouterConfig, StoreConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.residency.host_cache import HostCache
from tests.support.engines import SETTINGS
from tests.support.fault_proxy import FaultProxy
from tests.support.router_app import LocalBackend
from tests.support.s3 import S3Server
from tests.support.tiny import make_base, make_finetune
from tests.support.versions import BuiltVersion, build_version

NAMES = ("sick", "warm", "cold")


@dataclass(frozen=True)
class Models:
    """A base, and versions that are published as ``sick``, ``warm`` and ``cold``."""

    base: Path
    versions: dict[str, BuiltVersion]
    folder: Path

    def publish(self, server: S3Server) -> str:
        """Publish them in a new bucket; returns its name."""
        bucket = server.new_bucket()
        config = StoreConfig(url=f"s3://{bucket}", endpoint_url=server.endpoint, path_style=True)
        for name, version in self.versions.items():
            version.publish(open_store(config), name, self.folder / f"{bucket}-{name}")
        return bucket

    def blob(self, name: str) -> str:
        """What one of a version's blobs, that no other version has, is called in the store."""
        return self.versions[name].manifest.blobs[0].object_digest


def make_models(folder: Path) -> Models:
    """Small enough that one S3 request brings a blob."""
    base = make_base(folder / "base", hidden=64, layers=1)
    tunes = {name: make_finetune(base, folder / name, seed=seed) for seed, name in enumerate(NAMES)}
    # Equal tokenizers are read once: the sick version's is its own.
    with (tunes["sick"] / "tokenizer.json").open("a") as file:
        file.write("\n")
    return Models(base, {name: build_version(base, tune, "int4") for name, tune in tunes.items()}, folder)


@dataclass(frozen=True)
class ChaosApp:
    """A running application."""

    client: httpx.AsyncClient
    engine: AsyncEngine
    cache: HostCache
    registry: CollectorRegistry

    async def ask(self, model: str) -> httpx.Response:
        """A short completion."""
        return await self.client.post("/v1/completions", json={"model": model, "prompt": "abc", "max_tokens": 3})

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"deltazip_{name}", labels) or 0.0

    async def check(self) -> None:
        """Nothing leaked; to be called when nobody asks for anything."""
        await self.engine.check()
        self.cache.check()


@asynccontextmanager
async def chaos_app(
    models: Models,
    bucket: str,
    proxy: FaultProxy,
    *,
    engine: dict[str, Any] | None = None,
    store_timeout_s: float = 5.0,
    arena_bytes: int = 8 << 20,
    **node_store: Any,
) -> AsyncIterator[ChaosApp]:
    """Start it; the names of variants are known at the end, so that only versions are read from then on."""
    settings = {"fetch_threads": 4, "breaker": BreakerConfig(backoff_s=0.2), "quarantine_s": 0.3} | node_store
    config = AppConfig(
        base=str(models.base),
        store=StoreConfig(
            url=f"s3://{bucket}",
            endpoint_url=proxy.endpoint,
            path_style=True,
            timeout_s=store_timeout_s,
            max_attempts=2,
        ),
        engine=EngineConfig(**SETTINGS | {"load_timeout_s": 10.0} | (engine or {})),
        node_store=NodeStoreConfig(**settings),
        router=RouterConfig(catalog_refresh_s=1000),
    )
    registry = CollectorRegistry()
    store = open_store(config.store)
    digest = next(iter(models.versions.values())).manifest.base.digest
    cache = HostCache(Catalog(store, digest), bytearray(arena_bytes), config.node_store, registry)
    running = AsyncEngine(config.engine, models.base, cache, registry)
    files = {path.name: path.read_bytes() for path in models.base.iterdir()}
    service = RouterService(config, LocalBackend(running), lambda digest: Catalog(store, digest), files)
    api = build_api(service, RouterMetrics(), _no_scrape)
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with (
        api.router.lifespan_context(api),
        httpx.AsyncClient(transport=transport, base_url="http://router", timeout=60) as client,
    ):
        for _ in range(1000):
            if service.health().status != "starting":
                break
            await asyncio.sleep(0.01)
        yield ChaosApp(client, running, cache, registry)
    await running.stop()
    await cache.close()
    cache.check()
    assert cache.stats().held_bytes == 0, "a hold leaked"


async def _no_scrape() -> Iterable[tuple[Labels, str]]:
    return []
