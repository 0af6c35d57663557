"""The host tier over real stores: a folder and an S3 server; blobs of tensors, published and read back."""

import asyncio
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.artifact import ArtifactWriter
from deltazip_ray.artifact.blob import read_blob
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.artifact.manifest import BaseRef, TensorEntry
from deltazip_ray.artifact.object_store import ObjectStore
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import BreakerConfig, NodeStoreConfig, StoreConfig
from deltazip_ray.errors import StoreUnavailable
from deltazip_ray.residency.host_cache import HostCache
from tests.support.s3 import S3Server
from tests.support.serve_app import wait_until

BASE = "b" * 64
ARENA = 64 << 20


def publish(folder: Path, catalog: Catalog, seed: int) -> tuple[str, dict[str, torch.Tensor]]:
    """A version of three raw blobs, one of which has more than one range; returns it and its tensors by block."""
    source = FileStore(folder)
    writer = ArtifactWriter(source)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block, rows in (("layers.0", 7), ("layers.1", 1 << 18), ("outer", 1)):
        weight = "model.norm.weight" if block == "outer" else f"model.{block}.mlp.up_proj.weight"
        tensors[block] = torch.randn(rows, 12, generator=generator)
        entry = TensorEntry(codec="raw", shape=(rows, 12), bytes_finetuned=tensors[block].nbytes)
        writer.add_blob(block, {weight: tensors[block]}, {weight: entry})
    base = BaseRef(digest=BASE, architecture="LlamaForCausalLM", vocab_size=8)
    manifest = writer.finish(layout_version=1, base=base, bytes_finetuned=0)
    catalog.publish(source, manifest, f"variant-{seed}")
    return manifest.version(), tensors


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "file":
        return open_store(StoreConfig(url=(tmp_path / "store").as_uri()))
    server: S3Server = request.getfixturevalue("s3_environment")
    return open_store(StoreConfig(url=f"s3://{server.new_bucket()}", endpoint_url=server.endpoint, path_style=True))


async def test_tensors_come_back_as_they_were_published(store: ObjectStore, tmp_path: Path) -> None:
    catalog = Catalog(store, BASE)
    made = [publish(tmp_path / str(seed), catalog, seed) for seed in range(3)]
    cache = HostCache(catalog, bytearray(ARENA), NodeStoreConfig(), CollectorRegistry())
    deltas = await asyncio.gather(*(cache.acquire(version) for version, _ in made))
    for delta, (_, tensors) in zip(deltas, made, strict=True):
        for entry in delta.manifest.blobs:
            (found,) = read_blob(delta.blobs[entry.block], entry).values()
            assert torch.equal(found, tensors[entry.block])
    await cache.close()
    cache.check()


@pytest.fixture
def mortal(own_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> StoreConfig:
    """A bucket of a server that a test may kill."""
    for name, value in own_s3_server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{own_s3_server.new_bucket()}"
    return StoreConfig(url=url, endpoint_url=own_s3_server.endpoint, path_style=True, timeout_s=2, max_attempts=1)


async def test_a_server_that_dies_is_unavailable_until_it_is_back(
    own_s3_server: S3Server, mortal: StoreConfig, tmp_path: Path
) -> None:
    catalog = Catalog(open_store(mortal), BASE)
    here, there = [publish(tmp_path / str(seed), catalog, seed)[0] for seed in range(2)]
    cache = HostCache(catalog, bytearray(ARENA), NodeStoreConfig(), CollectorRegistry())
    await cache.acquire(here)
    own_s3_server.kill()
    with pytest.raises(StoreUnavailable):
        await cache.acquire(there)
    assert (await cache.acquire(here)).tier == "host"
    own_s3_server.start()
    assert (await cache.acquire(there)).tier == "remote"
    await cache.close()
    cache.check()


async def test_what_is_on_disk_outlives_process_and_server(
    own_s3_server: S3Server, mortal: StoreConfig, tmp_path: Path
) -> None:
    settings = NodeStoreConfig(disk_dir=tmp_path / "disk", breaker=BreakerConfig(backoff_s=2, backoff_max_s=2))
    catalog = Catalog(open_store(mortal), BASE)
    here, there = [publish(tmp_path / str(seed), catalog, seed)[0] for seed in range(2)]
    first = HostCache(catalog, bytearray(ARENA), settings, CollectorRegistry())
    await first.acquire(here)
    await asyncio.to_thread(wait_until, lambda: len(list((tmp_path / "disk").glob("*-*"))) == 4)
    await first.close()
    own_s3_server.kill()
    second = HostCache(Catalog(open_store(mortal), BASE), bytearray(ARENA), settings, CollectorRegistry())
    delta = await second.acquire(here)
    assert delta.tier == "disk"
    assert all(sha256_hex(delta.blobs[entry.block]) == entry.digest for entry in delta.manifest.blobs)
    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            await second.acquire(there)
    assert second.stats().refusals > 0
    own_s3_server.start()
    await asyncio.sleep(2)
    assert (await second.acquire(there)).tier == "remote"
    await second.close()
    second.check()
