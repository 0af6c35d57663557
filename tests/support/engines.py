"""Short ways to run an engine in tests."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.config import EngineConfig, NodeStoreConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.residency.host_cache import HostCache
from deltazip_ray.residency.tiers import DeltaSource
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams
from tests.support.zoo import Zoo

SETTINGS: dict[str, Any] = {
    "threads": 1,
    "slots": 4,
    "slot_bytes": 400_000,
    "max_batch_tokens": 256,
    "kv_blocks": 256,
    "max_model_len": 256,
}
GREEDY = SamplingParams(max_tokens=16, temperature=0.0)


class RunningEngine:
    """A started engine and what it has recorded."""

    def __init__(self, engine: AsyncEngine, registry: CollectorRegistry) -> None:
        self.engine = engine
        self.registry = registry

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"deltazip_engine_{name}", labels) or 0.0

    def steps_with(self, versions: int) -> float:
        """Steps that had more versions than the largest power of two below ``versions``."""
        below = max(bound for bound in (0, 1, 2, 4, 8) if bound < versions)
        return self.metric("step_versions_count") - self.metric("step_versions_bucket", le=f"{below:.1f}")

    async def generate(
        self, prompt: Sequence[int], version: str | None = None, sampling: SamplingParams = GREEDY, offset: int = 0
    ) -> list[int]:
        """All tokens of one request."""
        request = GenerateRequest("test", version, tuple(prompt), sampling, offset)
        return [token async for chunk in self.engine.generate(request) for token in chunk.tokens]


@asynccontextmanager
async def running(base: Path, source: DeltaSource, **settings: Any) -> AsyncIterator[RunningEngine]:
    """An engine with small settings, checked for leaks at the end."""
    registry = CollectorRegistry()
    engine = AsyncEngine(EngineConfig(**SETTINGS | settings), base, source, registry)
    await engine.start()
    try:
        yield RunningEngine(engine, registry)
        await engine.check()
    finally:
        await engine.stop()


@asynccontextmanager
async def serving(zoo: Zoo, arena_bytes: int = 4 << 20, **settings: Any) -> AsyncIterator[RunningEngine]:
    """An engine that gets its versions from the zoo's catalog by way of a host cache."""
    catalog = Catalog(zoo.store, zoo.versions[0].manifest.base.digest)
    cache = HostCache(catalog, bytearray(arena_bytes), NodeStoreConfig(fetch_threads=2), CollectorRegistry())
    try:
        async with running(zoo.base, cache, **settings) as run:
            yield run
        cache.check()
        assert cache.stats().held_bytes == 0
    finally:
        await cache.close()


def random_prompt(seed: int, length: int, vocab: int = 80) -> list[int]:
    """Tokens that every version of the tiny bases knows."""
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
