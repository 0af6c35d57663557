"""Versions without the compressor: deltas of tiny fine-tunes, rounded to nearest, and their merged weights."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import pad

from deltazip_kernels import CODECS, GROUP, LAYOUT_VERSION, LOW_RANK, RAW, pack, unpack
from deltazip_ray.artifact.artifact import ArtifactWriter, open_artifact
from deltazip_ray.artifact.blob import read_blob, write_blob
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.checkpoint import Checkpoint, base_digest
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.artifact.lossless import encode
from deltazip_ray.artifact.manifest import BaseRef, BlobEntry, FileEntry, Manifest, TensorEntry
from deltazip_ray.artifact.object_store import ObjectStore
from deltazip_ray.residency.tiers import HostDelta, Tier

RANK = 8
"""Of ``low_rank`` versions: what the best adapter of this rank keeps of a fine-tune."""
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight", "gpt_neox.embed_in.weight", "embed_out.weight")


@dataclass(frozen=True)
class BuiltVersion:
    """A version in memory."""

    manifest: Manifest
    blobs: dict[str, bytes]
    """Block to blob."""
    files: dict[str, bytes]
    """Tokenizer and the like, by name."""
    merged: dict[str, torch.Tensor]
    """What the served weights must equal, float32, by checkpoint name."""
    base: Checkpoint
    finetune: Path

    @property
    def version(self) -> str:
        return self.manifest.version()

    def write_artifact(self, folder: Path) -> Path:
        """An artifact, as the compressor would write it."""
        writer = ArtifactWriter(FileStore(folder))
        for entry in self.manifest.blobs:
            writer.add_blob(entry.block, read_blob(self.blobs[entry.block], entry), entry.tensors)
        for name, data in self.files.items():
            writer.add_file(name, data)
        m = self.manifest
        written = writer.finish(
            layout_version=m.layout_version, base=m.base, bytes_finetuned=m.bytes_finetuned, added_tokens=m.added_tokens
        )
        assert written.version() == self.version
        return folder

    def publish(self, store: ObjectStore, name: str, folder: Path, aliases: tuple[str, ...] = ("latest",)) -> str:
        """Publish under ``name`` by way of an artifact in ``folder``; returns the version."""
        manifest, source = open_artifact(self.write_artifact(folder))
        Catalog(store, manifest.base.digest).publish(source, manifest, name, aliases)
        return self.version

    def without(self, pattern: str) -> "BuiltVersion":
        """Another version, in which weights whose name matches are the base's and not in the delta."""
        blobs, entries, merged = {}, [], dict(self.merged)
        for entry in self.manifest.blobs:
            kept = {name: tensor for name, tensor in entry.tensors.items() if not re.search(pattern, name)}
            merged |= {name: self.base.tensor(name).float() for name in entry.tensors.keys() - kept.keys()}
            if kept:
                tensors = read_blob(self.blobs[entry.block], entry)
                data = write_blob({k: v for k, v in tensors.items() if not re.search(pattern, k)})
                blobs[entry.block] = data
                entries.append(_entry(entry.block, data, kept))
        manifest = self.manifest.model_copy(update={"blobs": tuple(entries)})
        return replace(self, manifest=manifest, blobs=blobs, merged=merged)

    def with_raw(self, values: Mapping[str, torch.Tensor]) -> "BuiltVersion":
        """Another version, in which some raw weights have these values."""
        blobs, entries = dict(self.blobs), []
        for entry in self.manifest.blobs:
            tensors = read_blob(self.blobs[entry.block], entry)
            tensors |= {name: value for name, value in values.items() if name in tensors}
            blobs[entry.block] = data = write_blob(tensors)
            entries.append(_entry(entry.block, data, entry.tensors))
        manifest = self.manifest.model_copy(update={"blobs": tuple(entries)})
        return replace(self, manifest=manifest, blobs=blobs, merged=self.merged | dict(values))

    def write_merged(self, path: Path) -> Path:
        """A Hugging Face checkpoint of the merged weights."""
        path.mkdir(parents=True, exist_ok=True)
        for file in self.finetune.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, path)
        save_file(self.merged, path / "model.safetensors", {"format": "pt"})
        return path


def build_version(
    base: Path, finetune: Path, codec: str = "int4", *, raw: str = "$never", codecs: Mapping[str, str] | None = None
) -> BuiltVersion:
    """The delta of ``finetune`` to ``base``: matrices in ``codec``, those whose name matches ``raw`` as they are.

    ``codecs``: regular expressions of names with a codec of their own.
    """
    old, new = Checkpoint.open(base), Checkpoint.open(finetune)
    blocks: dict[str, dict[str, torch.Tensor]] = {}
    entries: dict[str, dict[str, TensorEntry]] = {}
    merged: dict[str, torch.Tensor] = {}
    vocab = old.config["vocab_size"]
    for name in new.names:
        value, block = new.tensor(name).float(), _block(name)
        known = value[:vocab] if name in EMBEDDINGS else value
        chosen = next((c for pattern, c in (codecs or {}).items() if re.search(pattern, name)), codec)
        if value.dim() != 2 or re.search(raw, name):
            chosen = RAW
        tensors, merged[name] = _code(name, chosen, old.tensor(name).float(), known)
        rank = RANK if chosen == LOW_RANK else None
        entry = TensorEntry(codec=chosen, shape=tuple(known.shape), bytes_finetuned=known.nbytes, rank=rank)
        blocks.setdefault(block, {}).update(tensors)
        entries.setdefault(block, {})[name] = entry
        if len(known) < len(value):
            extra = value[vocab:].contiguous()
            blocks[block][f"{name}.added"] = extra
            entries[block][f"{name}.added"] = TensorEntry(
                codec=RAW, shape=tuple(extra.shape), bytes_finetuned=extra.nbytes
            )
            merged[name] = torch.cat([merged[name], extra])
    blobs = {block: write_blob(blocks[block]) for block in sorted(blocks, key=lambda b: (b == "outer", len(b), b))}
    files = {name: path.read_bytes() for name, path in new.files.items()}
    manifest = Manifest(
        layout_version=LAYOUT_VERSION,
        base=BaseRef(digest=base_digest(old), architecture=old.config["architectures"][0], vocab_size=vocab),
        added_tokens=new.config["vocab_size"] - vocab,
        bytes_finetuned=new.nbytes,
        blobs=tuple(_entry(block, blob, entries[block]) for block, blob in blobs.items()),
        files={name: FileEntry(digest=sha256_hex(data), size=len(data)) for name, data in files.items()},
    )
    return BuiltVersion(manifest, blobs, files, merged, old, finetune)


def round_to_nearest(codec: str, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """A delta ``[out, in]`` packed without calibration: the scale of a group is that of its largest weight."""
    kind = CODECS[codec]
    rows, columns = delta.shape
    groups = pad(delta, (0, -columns % GROUP)).view(rows, -1, GROUP)
    largest_level = (1 << kind.bits) - 1 - kind.zero
    scales = (groups.abs().amax(-1) / largest_level).clamp(min=1e-8).bfloat16().float()
    levels = (groups / scales[..., None] + kind.zero).round().clamp(0, (1 << kind.bits) - 1)
    codes = levels.to(torch.uint8).flatten(1)[:, :columns].contiguous()
    kept = None
    if kind.sparse:
        quads = pad(delta.abs(), (0, -columns % 4)).view(rows, -1, 4)
        kept = torch.zeros_like(quads, dtype=torch.bool).scatter(-1, quads.topk(2, dim=-1).indices, True)
        kept = kept.flatten(1)[:, :columns]
    return pack(codec, codes, scales, kept)


class MemorySource:
    """A DeltaSource over versions in memory that counts who holds what."""

    def __init__(self, *versions: BuiltVersion, tier: Tier = "host") -> None:
        self.versions = {version.version: version for version in versions}
        self.held: dict[str, int] = {}
        self.acquired: list[str] = []
        self.tier = tier

    async def acquire(self, version: str) -> HostDelta:
        built = self.versions[version]
        self.acquired.append(version)
        self.held[version] = self.held.get(version, 0) + 1
        return HostDelta(built.manifest, {block: memoryview(blob) for block, blob in built.blobs.items()}, self.tier)

    async def release(self, version: str) -> None:
        self.held[version] -= 1

    async def prefetch(self, version: str) -> bool:
        return version in self.versions

    async def discard(self, version: str, *, disk: bool = False) -> None:
        """Nothing: the versions are the test's."""

    def seconds_away(self, version: str) -> float:
        return 0.0


def _entry(block: str, data: bytes, tensors: Mapping[str, TensorEntry]) -> BlobEntry:
    return BlobEntry(
        block=block, digest=sha256_hex(data), size=len(data), tensors=dict(tensors), stored_as=encode(data)[1]
    )


def _block(name: str) -> str:
    found = re.match(r"[a-z_]+\.(layers\.\d+)\.", name)
    return found[1] if found else "outer"


def _code(
    name: str, codec: str, base: torch.Tensor, value: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of one weight for a blob, and the weight they make."""
    if codec == RAW:
        return {name: value.contiguous()}, value.contiguous()
    if codec == LOW_RANK:
        left, sizes, right = torch.linalg.svd(value - base, full_matrices=False)
        up, down = (left * sizes)[:, :RANK].bfloat16().contiguous(), right[:RANK].bfloat16().contiguous()
        return {f"{name}.up": up, f"{name}.down": down}, base + up.float() @ down.float()
    packed = round_to_nearest(codec, value - base)
    merged = base + unpack(codec, packed, (value.shape[0], value.shape[1]))
    return {f"{name}.{part}": tensor for part, tensor in packed.items()}, merged
