"""A Serve replica: an engine, its connection to the node store, and its reports to routers and metrics."""

import asyncio
import contextlib
import gc
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest

from deltazip_deployments.request_router import routing_stats
from deltazip_deployments.router.backend import ReplicaDescription
from deltazip_deployments.text.vocabulary import Vocabularies
from deltazip_ray.config import AppConfig
from deltazip_ray.engine.async_engine import AsyncEngine, EngineStats
from deltazip_ray.engine.structure import Structures
from deltazip_ray.errors import EngineError, StoreUnavailable
from deltazip_ray.residency.tiers import DeltaSource, HostMemory, PrefetchTier
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk

logger = logging.getLogger(__name__)

_MAX_BEAT_S = 1.0
_CHECK_S = 1.0
_LONGEST_STEP_S = 100.0
"""The first step of a kind may compile kernels; FlashInfer's take 80 s."""
_SWITCH_S = 0.0005
"""How long the event loop may hold the GIL while the step thread waits for it, which it does at every launch."""


class Engine(Protocol):
    """The engine's interface for a replica: AsyncEngine, or a scripted one in tests."""

    @property
    def base_digest(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def check(self) -> None: ...

    async def adopt(self, memory: HostMemory) -> None: ...

    async def prefetch(self, version: str, tier: PrefetchTier = "device") -> bool: ...

    def retire(self, version: str) -> None: ...

    def stats(self) -> EngineStats: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]: ...


class HostSource(DeltaSource, Protocol):
    """A DeltaSource that needs heartbeats from its user."""

    async def connect(self) -> HostMemory: ...

    async def heartbeat(self, metrics: str) -> frozenset[str]: ...

    async def retired(self) -> frozenset[str]: ...

    async def leave(self) -> None: ...


EngineFactory = Callable[[AppConfig, DeltaSource, CollectorRegistry], Engine]
SourceFactory = Callable[[AppConfig, Callable[[], str]], HostSource]
"""Makes the client of the node store; the second argument returns the base's digest once the engine has started."""


def make_engine(config: AppConfig, source: DeltaSource, registry: CollectorRegistry) -> Engine:
    """The real engine."""
    vocabularies = Vocabularies(config, lambda: engine.base_digest)
    make_matcher = Structures(vocabularies.get).matcher
    engine = AsyncEngine(config.engine, Path(config.base), source, registry, make_matcher=make_matcher)
    return engine


class Replica:
    """Runs requests. Created by Serve; it starts at the first health check, which comes before all requests."""

    def __init__(self, config: AppConfig, engine_factory: EngineFactory, source_factory: SourceFactory) -> None:
        self._config = config
        self._registry = CollectorRegistry()
        self._source = source_factory(config, lambda: self._engine.base_digest)
        self._engine = engine_factory(config, self._source, self._registry)
        self._started = False
        self._beats: asyncio.Task[None] | None = None
        self._on_host: frozenset[str] = frozenset()
        self._engine_check: asyncio.Task[None] | None = None
        self._checked_at = 0.0

    async def check_health(self) -> None:
        """Start at the first call; later raise if something is broken, so that Serve replaces the replica."""
        if not self._started:
            await self._engine.start()
            await self._engine.adopt(await self._source.connect())
            # Everything allocated so far stays; garbage collections over it would delay steps by 0.2 s.
            gc.collect()
            gc.freeze()
            sys.setswitchinterval(_SWITCH_S)
            self._beats = asyncio.create_task(self._beat())
            self._started = True
        if self._beats is not None and self._beats.done():
            self._beats.result()  # without heartbeats the node store drops this replica's leases
        await self._check_engine()

    async def describe(self) -> ReplicaDescription:
        """What the router needs to know about the base."""
        return ReplicaDescription(self._engine.base_digest, self._engine.max_model_len)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Tokens in groups: the first and the last one at once, the others when their turn comes."""
        async with contextlib.aclosing(self._engine.generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def prefetch(self, version: str) -> bool:
        """Load a version before it is requested, if that delays nothing else."""
        return await self._engine.prefetch(version)

    def record_routing_stats(self) -> dict[str, Any]:
        """Serve's hook: the input of placement."""
        stats = self._engine.stats()
        return routing_stats(
            device=stats.resident,
            loading=stats.loading,
            host=self._on_host,
            slots=stats.slots,
            capacity=self._config.engine.max_running,
            stopped=stats.stopped,
        )

    async def __del__(self) -> None:
        """Serve's hook for a graceful shutdown."""
        if self._beats is not None:
            self._beats.cancel()
        await self._engine.stop()
        await self._source.leave()

    async def _check_engine(self) -> None:
        """Check the engine, which answers between two steps. Returns within a second even if a step takes longer."""
        if self._engine_check is None:
            self._engine_check, self._checked_at = asyncio.create_task(self._engine.check()), time.monotonic()
        check = self._engine_check
        await asyncio.wait({check}, timeout=_CHECK_S)
        waited = time.monotonic() - self._checked_at
        if check.done():
            self._engine_check = None
            check.result()
        elif waited > _LONGEST_STEP_S:
            raise EngineError(f"no step has ended for {waited:.0f} s: is the device stuck?")

    async def _beat(self) -> None:
        """Send heartbeats with metrics to the node store, and receive the versions in the host's memory."""
        period = min(_MAX_BEAT_S, self._config.node_store.lease_timeout_s / 3)
        while True:
            try:
                self._on_host = await self._source.heartbeat(generate_latest(self._registry).decode())
                for version in await self._source.retired():
                    self._engine.retire(version)
            except StoreUnavailable as error:
                logger.warning("no heartbeat: %s", error.message)
            await asyncio.sleep(period)
