"""The router's HTTP API in this process, in front of scripted engines and a real catalog."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from deltazip_deployments.replica import Engine
from deltazip_deployments.router.api import build_api
from deltazip_deployments.router.backend import ReplicaDescription
from deltazip_deployments.router.metrics import RouterMetrics
from deltazip_deployments.router.scrape import Labels
from deltazip_deployments.router.service import RouterService
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.lossless import read_verified
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import AppConfig
from deltazip_ray.errors import DeltaZipError, EngineStopped
from deltazip_ray.residency.tiers import DeltaSource, HostDelta
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk


class EngineMaker(Protocol):
    """An EngineFactory that knows its base: a ``Script``, or one of real engines."""

    @property
    def base_digest(self) -> str: ...

    def __call__(self, config: AppConfig, source: DeltaSource, registry: CollectorRegistry) -> Engine: ...


class CatalogSource:
    """A DeltaSource that reads the catalog each time."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.held: list[str] = []

    async def acquire(self, version: str) -> HostDelta:
        manifest = await asyncio.to_thread(self._catalog.manifest, version)
        store, key = self._catalog.store, self._catalog.blob_key
        blobs = {b.block: memoryview(read_verified(store, key(b.object_digest), b)) for b in manifest.blobs}
        self.held.append(version)
        return HostDelta(manifest, blobs, "remote")

    async def release(self, version: str) -> None:
        self.held.remove(version)


@dataclass
class LocalBackend:
    """A Backend without Ray. ``fail_after`` breaks streams off: how many chunks each call gives before it dies."""

    engine: Engine
    fail_after: list[int | None] = field(default_factory=list)
    lose_the_end: bool = False
    """Break off instead of telling that the last token was the last."""
    refuse: DeltaZipError | None = None
    missing: bool = False
    """There is no replica, ever."""
    requests: list[GenerateRequest] = field(default_factory=list)
    brought: list[str] = field(default_factory=list)

    async def bring(self, version: str) -> None:
        self.brought.append(version)

    async def describe(self) -> ReplicaDescription:
        if self.missing:
            await asyncio.Event().wait()
        await self.engine.start()
        return ReplicaDescription(self.engine.base_digest, self.engine.max_model_len)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        self.requests.append(request)
        left = self.fail_after.pop(0) if self.fail_after else None
        if self.refuse is not None:
            raise self.refuse
        async with aclosing(self.engine.generate(request)) as chunks:
            async for chunk in chunks:
                if left == 0:
                    raise EngineStopped("the replica died")
                left = None if left is None else left - 1
                if self.lose_the_end and chunk.finish_reason is not None:
                    yield chunk._replace(finish_reason=None)
                    raise EngineStopped("the replica died")
                yield chunk


@dataclass(frozen=True)
class RouterApp:
    """A running API and what is behind it."""

    api: FastAPI
    client: httpx.AsyncClient
    service: RouterService
    backend: LocalBackend


@asynccontextmanager
async def router_app(
    config: AppConfig, script: EngineMaker, base: Path, *, replicas: bool = True
) -> AsyncIterator[RouterApp]:
    """Start the API; requests go through ASGI, without a socket."""
    store = open_store(config.store)
    source = CatalogSource(Catalog(store, script.base_digest))
    backend = LocalBackend(script(config, source, CollectorRegistry()), missing=not replicas)
    files = await asyncio.to_thread(_contents, base)
    service = RouterService(config, backend, lambda digest: Catalog(store, digest), files)

    metrics = RouterMetrics()

    async def scrape() -> Iterable[tuple[Labels, str]]:
        return [
            ({}, metrics.text()),
            ({"replica": "r1", "node": "n1"}, "# TYPE x gauge\nx 1\n"),
            ({"node": "n1"}, "# TYPE y gauge\ny 2\n"),
        ]

    api = build_api(service, metrics, scrape)
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with (
        api.router.lifespan_context(api),
        httpx.AsyncClient(transport=transport, base_url="http://router", timeout=10) as client,
    ):
        for _ in range(1000 if replicas else 0):
            if service.health().status != "starting":
                break
            await asyncio.sleep(0.01)
        yield RouterApp(api, client, service, backend)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
