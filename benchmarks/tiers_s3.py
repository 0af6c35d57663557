"""``python -m benchmarks.tiers_s3 [--rclone PATH] --json FILE``: a cold version from a real S3 server on loopback.

Compared with a bare downloader: as many threads and requests of the same ranges into the same memory, and nothing
else: no digests, no arena, no books. The server is ``rclone serve s3`` over files, which are in the page cache.
Without ``--rclone``: what the lossless stage gains on coded normal deltas, and what undoing it costs.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import boto3
import torch
from botocore.config import Config
from prometheus_client import CollectorRegistry

from deltazip_kernels import CODECS, LAYOUT_VERSION, Codec, pack
from deltazip_ray.artifact.artifact import ArtifactWriter
from deltazip_ray.artifact.blob import write_blob
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.artifact.lossless import decode, encode
from deltazip_ray.artifact.manifest import BaseRef, BlobEntry, Manifest, TensorEntry
from deltazip_ray.artifact.object_store import PART
from deltazip_ray.artifact.s3_store import PARALLEL
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import MIB, CodecName, NodeStoreConfig, StoreConfig
from deltazip_ray.residency.host_cache import HostCache

BASE = "b" * 64
SHAPE = (4096, 4096)
CODED: tuple[CodecName, ...] = ("int4", "int3", "int2", "int1", "sparse24_int4", "sparse24_int2")


def coded(codec: CodecName, seed: int, shape: tuple[int, int] = SHAPE) -> dict[str, torch.Tensor]:
    """A normal delta, rounded to the nearest level, with the multiple of the spread for a scale that loses least."""
    kind, generator = CODECS[codec], torch.Generator().manual_seed(seed)
    groups = torch.randn(shape, generator=generator).view(shape[0], -1, 128)
    spread = groups.std(-1)

    def loss(reach: float) -> float:
        scales = reach * spread[:64]
        rounded = (levels(groups[:64], scales, kind) - kind.zero) * scales[..., None]
        return float((groups[:64] - rounded).square().sum())

    scales = (min((0.02 * step for step in range(2, 100)), key=loss) * spread).bfloat16().float()
    kept = None
    if kind.sparse:
        quads = groups.abs().view(shape[0], -1, 4)
        kept = torch.zeros_like(quads, dtype=torch.bool).scatter(-1, quads.topk(2, dim=-1).indices, True).flatten(1)
    return pack(codec, levels(groups, scales, kind).flatten(1).to(torch.uint8), scales, kept)


def levels(groups: torch.Tensor, scales: torch.Tensor, kind: Codec) -> torch.Tensor:
    """The nearest codes, as floats."""
    return (groups / scales[..., None]).add(kind.zero).round().clamp(0, (1 << kind.bits) - 1)


def make_version(
    store: FileStore, blocks: int, make: Callable[[int], tuple[CodecName, dict[str, torch.Tensor]]]
) -> Manifest:
    """A version with one matrix in each blob; ``make`` gives its codec and its tensors by part."""
    writer = ArtifactWriter(store)
    for block in range(blocks):
        weight = f"model.layers.{block}.mlp.up_proj.weight"
        codec, parts = make(block)
        tensors = {weight if part == "values" else f"{weight}.{part}": tensor for part, tensor in parts.items()}
        shape = tuple(parts["values"].shape) if "values" in parts else SHAPE
        entry = TensorEntry(codec=codec, shape=shape, bytes_finetuned=2 * shape[0] * shape[1])
        writer.add_blob(f"layers.{block}", tensors, {weight: entry})
    base = BaseRef(digest=BASE, architecture="LlamaForCausalLM", vocab_size=1)
    return writer.finish(layout_version=LAYOUT_VERSION, base=base, bytes_finetuned=0)


def noise(block: int) -> tuple[CodecName, dict[str, torch.Tensor]]:
    """As many bytes as a block of an 8B model has in int2, 59 MB, that nothing compresses."""
    generator = torch.Generator().manual_seed(block)
    values = torch.randint(-(1 << 15), 1 << 15, (7168, 4096), generator=generator, dtype=torch.int16)
    return "raw", {"values": values.view(torch.bfloat16)}


def int2(block: int) -> tuple[CodecName, dict[str, torch.Tensor]]:
    """4 MB of coded deltas."""
    return "int2", coded("int2", block)


@contextmanager
def s3_server(rclone: Path, folder: Path) -> Iterator[StoreConfig]:
    """A bucket on loopback; credentials are in the environment."""
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    (folder / "bucket").mkdir(parents=True)
    command = [
        rclone,
        "serve",
        "s3",
        folder,
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        "key,secret",
        "--no-checksum",
    ]
    server = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if time.monotonic() > deadline:
                raise SystemExit("rclone did not start")
            time.sleep(0.05)
        yield StoreConfig(
            url="s3://bucket", endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1", path_style=True
        )
    finally:
        server.terminate()
        server.wait()


def bare(config: StoreConfig, objects: dict[str, int], buffer: memoryview) -> float:
    """Seconds to download objects (key to size) in ranges, all at once."""
    client = boto3.client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=config.region,
        config=Config(
            s3={"addressing_style": "path"}, max_pool_connections=32, response_checksum_validation="when_required"
        ),
    )
    ranges, begin = [], 0
    for key, size in objects.items():
        ranges += [(key, start, begin + start, min(PART, size - start)) for start in range(0, size, PART)]
        begin += size

    def read(piece: tuple[str, int, int, int]) -> None:
        key, start, position, size = piece
        answer = client.get_object(Bucket="bucket", Key=key, Range=f"bytes={start}-{start + size - 1}")
        with closing(answer["Body"]) as body:
            stream: Any = body
            end = position + size
            while position < end and (count := stream.readinto(buffer[position : min(end, position + MIB)])):
                position += count

    began = time.perf_counter()
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(read, ranges))
    return time.perf_counter() - began


async def fetch(catalog: Catalog, version: str, buffer: bytearray) -> float:
    """Seconds until a cold version is in the arena, verified."""
    cache = HostCache(catalog, buffer, NodeStoreConfig(), CollectorRegistry())
    began = time.perf_counter()
    await cache.acquire(version)
    seconds = time.perf_counter() - began
    await cache.release(version)
    await cache.close()
    return seconds


def compare(config: StoreConfig, source: FileStore, manifest: Manifest, runs: int) -> dict[str, Any]:
    """The product's fetch and the bare one, in turns; also seconds of cores in this process, all threads together."""
    catalog = Catalog(open_store(config), BASE)
    catalog.publish(source, manifest, "name")
    objects = {catalog.blob_key(entry.object_digest): entry.object_size for entry in manifest.blobs}
    buffer = bytearray(manifest.bytes_artifact + 4096 * len(manifest.blobs))
    ours, theirs, cores = [], [], []
    for _ in range(runs + 1):
        before = time.process_time()
        theirs.append(bare(config, objects, memoryview(buffer)))
        between = time.process_time()
        ours.append(asyncio.run(fetch(catalog, manifest.version(), buffer)))
        cores.append((time.process_time() - between, between - before))
    stored = sum(objects.values())
    return {
        "bytes": manifest.bytes_artifact,
        "bytes_stored": stored,
        "fetch_s": ours[1:],
        "bare_s": theirs[1:],
        "fetch_core_s": statistics.median(fetched for fetched, _ in cores[1:]),
        "bare_core_s": statistics.median(downloaded for _, downloaded in cores[1:]),
        "bare_bytes_per_s": stored / statistics.median(theirs[1:]),
        "of_bare": statistics.median(theirs[1:]) / statistics.median(ours[1:]),
    }


def lossless(codec: CodecName) -> dict[str, Any]:
    """What the lossless stage gains on a normal delta, and its speed on one core."""
    name = "model.layers.0.mlp.up_proj.weight"
    parts = coded(codec, 0, (2048, 4096))
    data = write_blob({f"{name}.{part}": tensor for part, tensor in parts.items()})
    stored, form = encode(data)
    found: dict[str, Any] = {
        "codec": codec,
        "bytes": len(data),
        "stored": len(stored),
        "ratio": len(stored) / len(data),
    }
    if form is not None:
        entry = BlobEntry(
            block="layers.0",
            digest="0" * 64,
            size=len(data),
            tensors={name: TensorEntry(codec=codec, shape=(2048, 4096), bytes_finetuned=0)},
            stored_as=form,
        )
        buffer = bytearray(len(data))
        samples = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in decode([memoryview(stored)], memoryview(buffer), entry):
                pass
            samples.append(len(data) / (time.perf_counter() - began))
        found["decompress_bytes_per_s"] = max(samples)
    return found


def from_server(rclone: Path, runs: int) -> dict[str, Any]:
    """Both kinds of versions."""
    result = {}
    with tempfile.TemporaryDirectory() as name, s3_server(rclone, Path(name) / "s3") as config:
        for kind, blocks, make in (("noise", 16, noise), ("int2", 16, int2)):
            source = FileStore(Path(name) / kind)
            source.create()
            manifest = make_version(source, blocks, make)
            result[kind] = compare(config, source, manifest, runs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rclone", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this tree")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"cores": os.cpu_count(), "commit": options.commit}
    if options.rclone is None:
        result["lossless"] = [lossless(codec) for codec in CODED]
    else:
        result |= from_server(options.rclone, options.runs)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
