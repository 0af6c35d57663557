"""A replica that cannot show life any more must be replaced: its holds are dropped while it goes on."""

import asyncio
from pathlib import Path

import pytest

from deltazip_deployments import replica as replica_module
from deltazip_deployments.replica import Replica
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.config import AppConfig, StoreConfig
from deltazip_ray.errors import EngineError, StoreUnavailable
from deltazip_ray.residency.tiers import HostMemory
from tests.support.catalogs import BASE_DIGEST
from tests.support.fake_engine import FakeEngine, Script
from tests.support.router_app import CatalogSource


class Source(CatalogSource):
    """A way to the node store whose heartbeats fail as the test asks."""

    problem: Exception | None = None

    async def connect(self) -> HostMemory:
        return HostMemory(memoryview(b""))

    async def heartbeat(self, metrics: str) -> frozenset[str]:
        if self.problem is not None:
            raise self.problem
        return frozenset()

    async def retired(self) -> frozenset[str]:
        return frozenset()

    async def leave(self) -> None:
        """Nobody is told."""


class Busy(FakeEngine):
    """An engine that ends no step until it is told to."""

    step = asyncio.Event()

    async def check(self) -> None:
        await self.step.wait()


async def test_a_long_step_is_no_illness_and_a_step_without_end_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(Catalog(FileStore(tmp_path), BASE_DIGEST))
    config = AppConfig(base="/nowhere", store=StoreConfig(url=tmp_path.as_uri()))
    monkeypatch.setattr(replica_module, "_CHECK_S", 0.01)
    busy = Replica(config, lambda *parts: Busy(Script(), *parts), lambda *_: source)
    await busy.check_health()
    monkeypatch.setattr(replica_module, "_LONGEST_STEP_S", 0.0)
    with pytest.raises(EngineError, match="no step has ended"):
        await busy.check_health()
    Busy.step.set()
    await asyncio.sleep(0)
    await busy.check_health()
    await busy.__del__()


@pytest.mark.parametrize(("problem", "healthy"), [(StoreUnavailable("away"), True), (EngineError("broken"), False)])
async def test_a_replica_without_heartbeats_is_not_healthy(tmp_path: Path, problem: Exception, healthy: bool) -> None:
    source = Source(Catalog(FileStore(tmp_path), BASE_DIGEST))
    config = AppConfig(base="/nowhere", store=StoreConfig(url=tmp_path.as_uri()))
    replica = Replica(config, Script(), lambda *_: source)
    source.problem = problem
    await replica.check_health()
    await asyncio.sleep(0)
    if healthy:
        await replica.check_health()
    else:
        with pytest.raises(EngineError, match="broken"):
            await replica.check_health()
    await replica.__del__()
