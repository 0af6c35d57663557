"""The router's API in front of a real engine, all in this process, for the ``openai`` client."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
from prometheus_client import CollectorRegistry

from deltazip_deployments.replica import Engine, make_engine
from deltazip_ray.config import AppConfig, EngineConfig, StoreConfig
from deltazip_ray.residency.tiers import DeltaSource
from tests.support.engines import SETTINGS
from tests.support.router_app import RouterApp, router_app
from tests.support.zoo import Zoo


@dataclass(frozen=True)
class RealEngine:
    """An engine factory, as ``Script`` is for a scripted one."""

    base_digest: str

    def __call__(self, config: AppConfig, source: DeltaSource, registry: CollectorRegistry) -> Engine:
        return make_engine(config, source, registry)


@dataclass(frozen=True)
class RealApp:
    """A client and what is behind it."""

    openai: openai.AsyncOpenAI
    router: RouterApp


@asynccontextmanager
async def real_router(zoo: Zoo) -> AsyncIterator[RealApp]:
    """Serve a zoo as ``base`` and ``variant-0`` …; stops the engine at the end."""
    config = AppConfig(
        base=str(zoo.base), store=StoreConfig(url=zoo.store.root.as_uri()), engine=EngineConfig(**SETTINGS)
    )
    script = RealEngine(zoo.versions[0].manifest.base.digest)
    async with router_app(config, script, Path(config.base)) as app:
        transport = app.client._transport
        http = httpx.AsyncClient(transport=transport, base_url="http://router", timeout=60)
        async with openai.AsyncOpenAI(
            base_url="http://router/v1", api_key="none", max_retries=0, http_client=http
        ) as client:
            try:
                yield RealApp(client, app)
                await app.backend.engine.check()
            finally:
                await app.backend.engine.stop()
