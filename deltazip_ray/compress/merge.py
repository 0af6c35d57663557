"""Turns a base and an artifact back into a Hugging Face checkpoint."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deltazip_ray.artifact.artifact import open_artifact
from deltazip_ray.artifact.blob import read_blob
from deltazip_ray.artifact.checkpoint import Checkpoint, base_digest
from deltazip_ray.artifact.lossless import read_verified
from deltazip_ray.artifact.manifest import Manifest, TensorEntry, blob_key
from deltazip_ray.artifact.object_store import ObjectStore
from deltazip_ray.compress.options import Progress, silent
from deltazip_ray.compress.parts import rebuild
from deltazip_ray.compress.skeleton import WEIGHT_DTYPES, Skeleton
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import BaseMismatch, ConfigError, ManifestInvalid

CONFIG = "config.json"
SHARD_BYTES = 2 << 30
"""A shard is closed once it has this many bytes."""
WEIGHTS_FROM = 0.2
"""For progress: the share of the work that computing the base's digest takes."""


def merge(
    base: Path,
    artifact: StoreConfig | str | Path,
    out: Path,
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Write base + dequantized delta to the new folder ``out``: weights, config and tokenizer files.

    ``dtype`` defaults to the fine-tune's; float32 keeps the sums unrounded. Blobs are verified. At most one block and
    one shard are in memory. Raises BaseMismatch when the artifact belongs to another base, ArtifactError, StoreError,
    CheckpointInvalid, and ConfigError when ``out`` exists or cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: give a new folder")
    manifest, store = open_artifact(artifact)
    checkpoint = Checkpoint.open(base)
    digest = base_digest(checkpoint)
    if digest != manifest.base.digest:
        raise BaseMismatch(
            f"the artifact belongs to base {manifest.base.digest[:12]}, but {base} is {digest[:12]}: "
            "give the base that it was compressed against"
        )
    config = _config(manifest, store)
    dtype = dtype or _dtype(config)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    try:
        _write(out, config, manifest, store, _weights(checkpoint, manifest, store, progress), dtype)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {out}: {error}: free space, or give another folder") from error
    progress("done", 1.0)
    return manifest


def _write(
    out: Path,
    config: dict[str, Any],
    manifest: Manifest,
    store: ObjectStore,
    weights: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Write to a temporary folder beside ``out``, and rename it when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        partial = Path(folder) / out.name
        partial.mkdir()
        for name, entry in manifest.files.items():
            (partial / name).write_bytes(read_verified(store, blob_key(entry.object_digest), entry))
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _write_weights(partial, weights, dtype)
        partial.rename(out)


def _weights(
    checkpoint: Checkpoint, manifest: Manifest, store: ObjectStore, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all weights of the reconstruction, block by block."""
    skeleton = Skeleton(checkpoint)
    blobs = {blob.block: blob for blob in manifest.blobs}
    shapes = skeleton.shapes()
    blocks = [f"layers.{index}" for index in range(skeleton.blocks)]
    homes = {f"{skeleton.block_name(index)}.": block for index, block in enumerate(blocks)}
    by_block: dict[str, list[str]] = {block: [] for block in ("outer", *blocks)}
    for name in shapes:
        by_block[next((block for prefix, block in homes.items() if name.startswith(prefix)), "outer")].append(name)
    for done, (block, names) in enumerate(by_block.items()):
        progress(f"weights of {block}", WEIGHTS_FROM + (1 - WEIGHTS_FROM) * done / len(by_block))
        entries: dict[str, TensorEntry] = {}
        tensors: dict[str, Tensor] = {}
        if block in blobs:
            entry = blobs[block]
            entries, tensors = (
                entry.tensors,
                read_blob(read_verified(store, blob_key(entry.object_digest), entry), entry),
            )
        for name in names:
            yield name, rebuild(name, checkpoint.tensor(name), entries, tensors)


def _write_weights(folder: Path, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Write safetensors shards, and an index when there is more than one."""
    homes: dict[str, int] = {}
    shards: list[Path] = []
    shard: dict[str, Tensor] = {}
    total = size = 0
    for name, weight in weights:
        shard[name] = weight.to(dtype).contiguous()
        homes[name] = len(shards)
        size += shard[name].nbytes
        total += shard[name].nbytes
        if size >= SHARD_BYTES:
            shards.append(_save(folder, len(shards), shard))
            shard, size = {}, 0
    if shard:
        shards.append(_save(folder, len(shards), shard))
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for path, name in zip(shards, names, strict=True):
        path.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[home] for name, home in homes.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save(folder: Path, number: int, shard: dict[str, Tensor]) -> Path:
    """Write one shard under a preliminary name: the final one contains the number of shards."""
    path = folder / f"{number}.safetensors"
    save_file(shard, path, metadata={"format": "pt"})
    return path


def _config(manifest: Manifest, store: ObjectStore) -> dict[str, Any]:
    """The fine-tune's config.json. Raises ManifestInvalid when the artifact has none."""
    entry = manifest.files.get(CONFIG)
    if entry is None:
        raise ManifestInvalid(f"the artifact has no {CONFIG} of the fine-tune: compress it again")
    try:
        config: dict[str, Any] = json.loads(read_verified(store, blob_key(entry.object_digest), entry))
    except ValueError as error:
        raise ManifestInvalid(f"the artifact's {CONFIG} is not JSON: compress the fine-tune again") from error
    return config


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype that a config names; float32 when it names none."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    for dtype in WEIGHT_DTYPES:
        if str(dtype) == f"torch.{name}":
            return dtype
    raise ManifestInvalid(f"the artifact's {CONFIG} names dtype {name}: ask for float32, bfloat16 or float16")
