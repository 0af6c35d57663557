"""The lossless stage: smaller in the store, the same in memory, and nothing that is wrong gets through."""

import io
from pathlib import Path

import pytest
import torch
import zstandard
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from deltazip_kernels import LAYOUT_VERSION, pack
from deltazip_ray.artifact.artifact import ArtifactWriter, open_artifact, verify_artifact
from deltazip_ray.artifact.blob import read_blob
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.artifact.lossless import decode, encode, read_verified
from deltazip_ray.artifact.manifest import BaseRef, BlobEntry, Manifest, TensorEntry, blob_key
from deltazip_ray.config import NodeStoreConfig
from deltazip_ray.errors import BlobCorrupt
from deltazip_ray.residency.host_cache import HostCache

BASE = "b" * 64
NAME = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def make(folder: Path) -> Manifest:
    """An artifact of an int4 matrix whose codes are normal, and a norm that is noise."""
    generator = torch.Generator().manual_seed(0)
    levels = (torch.randn(128, 1024, generator=generator) * 2 + 8).round().clamp(0, 15).to(torch.uint8)
    writer = ArtifactWriter(FileStore(folder))
    entry = TensorEntry(codec="int4", shape=(128, 1024), bytes_finetuned=1 << 18)
    parts = pack("int4", levels, torch.rand(128, 8, generator=generator))
    writer.add_blob("layers.0", {f"{NAME}.{part}": tensor for part, tensor in parts.items()}, {NAME: entry})
    norm = torch.randint(0, 1 << 15, (4096,), generator=generator, dtype=torch.int16).view(torch.bfloat16)
    raw = TensorEntry(codec="raw", shape=(4096,), bytes_finetuned=8192)
    writer.add_blob("outer", {NORM: norm}, {NORM: raw})
    writer.add_file("tokenizer.json", b"{}" * 1000)
    base = BaseRef(digest=BASE, architecture="LlamaForCausalLM", vocab_size=1)
    return writer.finish(layout_version=LAYOUT_VERSION, base=base, bytes_finetuned=1 << 18)


def test_what_pays_is_compressed_and_the_rest_is_not(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    coded, raw = manifest.blobs
    assert coded.stored_as is not None
    assert coded.object_size < 0.9 * coded.size
    assert raw.stored_as is None
    assert raw.object_size == raw.size
    assert manifest.bytes_artifact == coded.size + raw.size
    assert manifest.bytes_stored == coded.object_size + raw.size + 2000
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "blobs" / "sha256").iterdir()}
    assert sizes == {entry.object_digest: entry.object_size for entry in manifest.stored}
    for entry in manifest.blobs:
        read_blob(read_verified(FileStore(tmp_path), blob_key(entry.object_digest), entry), entry)


def test_the_name_of_a_version_without_the_stage_is_as_before() -> None:
    entry = BlobEntry(
        block="outer",
        digest="a" * 64,
        size=1,
        tensors={NORM: TensorEntry(codec="raw", shape=(1,), bytes_finetuned=2)},
    )
    base = BaseRef(digest=BASE, architecture="L", vocab_size=1)
    manifest = Manifest(layout_version=1, base=base, bytes_finetuned=1, blobs=(entry,))
    assert b"stored_as" not in manifest.canonical()


async def test_the_host_gets_the_bytes_that_the_digest_names(tmp_path: Path) -> None:
    manifest = make(tmp_path / "artifact")
    catalog = Catalog(FileStore(tmp_path / "store"), BASE)
    catalog.publish(open_artifact(tmp_path / "artifact")[1], manifest, "name")
    registry = CollectorRegistry()
    settings = NodeStoreConfig(disk_dir=tmp_path / "disk")
    for tier in ("remote", "disk"):
        cache = HostCache(catalog, bytearray(1 << 20), settings, registry := CollectorRegistry())
        delta = await cache.acquire(manifest.version())
        assert delta.tier == tier
        for entry in manifest.blobs:
            assert sha256_hex(delta.blobs[entry.block]) == entry.digest
        await cache.release(manifest.version())
        assert cache._disk is not None
        cache._disk._writer.shutdown()
        await cache.close()
        sizes = {"remote": sum(e.object_size for e in manifest.blobs), "disk": manifest.bytes_artifact}
        assert registry.get_sample_value("deltazip_host_fetched_bytes_total", {"tier": tier}) == sizes[tier]
        stages = {"remote": ("queue", "store", "decompress", "verify"), "disk": ("queue", "disk")}[tier]
        for stage in stages:
            assert registry.get_sample_value("deltazip_host_stage_seconds_count", {"stage": stage}), stage


def decode_in_pieces(stored: bytes, buffer: memoryview, entry: BlobEntry) -> None:
    """Pieces that have nothing to do with those that were compressed."""
    pieces = (memoryview(stored)[start : start + 777] for start in range(0, len(stored), 777))
    assert b"".join(bytes(part) for part in decode(pieces, buffer, entry)) == buffer


def frame(data: bytes, *, size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=size).compress(data)


@pytest.mark.parametrize(
    "stored",
    [
        frame(b"x" * 99),
        frame(b"x" * 101),
        frame(b"x" * (1 << 24)),
        frame(b"x" * 100)[:-3],
        b"",
        b"not zstandard at all",
        frame(b"x" * 50, size=False),
    ],
)
def test_what_does_not_make_the_blob_is_refused_and_nothing_is_written_beyond(stored: bytes) -> None:
    memory = bytearray(200)
    tensors = {NORM: TensorEntry(codec="raw", shape=(1,), bytes_finetuned=2)}
    entry = BlobEntry(block="outer", digest="a" * 64, size=100, tensors=tensors)
    with pytest.raises(BlobCorrupt, match="--repair"):
        decode_in_pieces(stored, memoryview(memory)[:100], entry)
    assert not any(memory[100:])


def test_streams_in_many_pieces_are_read_whole() -> None:
    data = torch.randint(0, 3, (1 << 20,), dtype=torch.uint8).numpy().tobytes()
    out = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as writer:
        for start in range(0, len(data), 10_000):
            writer.write(data[start : start + 10_000])
            writer.flush()
    tensors = {NORM: TensorEntry(codec="raw", shape=(1,), bytes_finetuned=2)}
    entry = BlobEntry(block="outer", digest="a" * 64, size=len(data), tensors=tensors)
    buffer = bytearray(len(data))
    decode_in_pieces(out.getvalue(), memoryview(buffer), entry)
    assert buffer == data


@pytest.mark.parametrize("damage", [0, 10, -1])
def test_damage_in_the_store_is_found(tmp_path: Path, damage: int) -> None:
    manifest = make(tmp_path)
    path = tmp_path / blob_key(manifest.blobs[0].object_digest)
    data = bytearray(path.read_bytes())
    data[damage] ^= 1
    path.write_bytes(data)
    with pytest.raises(BlobCorrupt, match=path.name[:12]):
        verify_artifact(manifest, FileStore(tmp_path))


def test_noise_is_left_as_it_is() -> None:
    noise = torch.randint(0, 256, (1 << 16,), dtype=torch.uint8).numpy().tobytes()
    assert encode(noise) == (noise, None)


def test_a_stored_form_that_is_larger_is_no_manifest() -> None:
    tensors = {NORM: TensorEntry(codec="raw", shape=(1,), bytes_finetuned=2)}
    with pytest.raises(ValidationError, match="larger"):
        BlobEntry.model_validate(
            {
                "block": "outer",
                "digest": "a" * 64,
                "size": 100,
                "tensors": tensors,
                "stored_as": {"encoding": "zstd", "digest": "c" * 64, "size": 101},
            }
        )
