"""Hugging Face checkpoints: safetensors shards read lazily, and the digest that names a base.

Pickled weights are refused, and so are checkpoints that come with Python code.
"""

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from deltazip_ray.artifact.architecture import architecture_of
from deltazip_ray.artifact.manifest import FILES
from deltazip_ray.errors import CheckpointInvalid

_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_JSON = 64 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Stored:
    """One tensor in a shard."""

    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """A checkpoint folder. Tensors are mapped from disk when they are asked for; reading is thread-safe.

    ``config`` is ``config.json``; ``files`` maps the names in :data:`FILES` that exist to their paths.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], shards: Mapping[str, Any], tensors: Mapping[str, _Stored]
    ) -> None:
        self.path = path
        self.config = config
        self.files: dict[str, Path] = {name: path / name for name in FILES if (path / name).is_file()}
        self._shards = shards
        self._tensors = tensors
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read the configuration and every shard's header; raises CheckpointInvalid."""
        path = Path(path)
        if not path.is_dir():
            raise CheckpointInvalid(f"{path} is not a folder: give the folder of a Hugging Face checkpoint")
        if not (path / "config.json").is_file():
            raise CheckpointInvalid(f"{path} has no config.json: give the folder of a Hugging Face checkpoint")
        refuse_code(path / "config.json")
        refuse_code(path / "tokenizer_config.json")
        shards: dict[str, Any] = {}
        tensors: dict[str, _Stored] = {}
        for shard, wanted in _shards_of(path):
            shards[shard], found = _open_shard(path / shard)
            missing = sorted(set(wanted or ()) - found.keys())
            if missing:
                raise CheckpointInvalid(f"{path / shard} has no {missing[0]}, which the index lists: copy it again")
            tensors |= {name: found[name] for name in wanted or found}
        return cls(path, _read_json(path / "config.json"), shards, tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.nbytes for stored in self._tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; raises CheckpointInvalid when there is no such tensor."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype as stored."""
        return self._stored(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in its stored dtype. It may be mapped from the file: don't write to it."""
        stored = self._stored(name)
        try:
            with self._lock:
                tensor: torch.Tensor = self._shards[stored.shard].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointInvalid(f"cannot read {name} from {self.path / stored.shard}: {error}") from error
        return tensor

    def _stored(self, name: str) -> _Stored:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointInvalid(
                f"{self.path} has no tensor {name}: it is incomplete, or its architecture is another one"
            ) from None


def base_digest(checkpoint: Checkpoint, progress: Callable[[int], None] | None = None) -> str:
    """The digest that names a base: sha256 in hex over its weights and its architecture.

    It does not depend on how the weights are sharded, nor on keys of ``config.json`` that do not change the
    computation. ``progress`` gets the size of each tensor when it is done, from worker threads, one call at a time.
    """
    lock = threading.Lock()

    def line(name: str) -> list[Any]:
        tensor = checkpoint.tensor(name)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(raw.data).hexdigest()
        if progress is not None:
            with lock:
                progress(raw.nbytes)
        return [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest]

    # sha256 releases the interpreter's lock, so threads hash in parallel.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        lines = list(pool.map(line, checkpoint.names))
    document = {"architecture": architecture_of(checkpoint.config), "tensors": lines}
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _shards_of(path: Path) -> Iterator[tuple[str, list[str] | None]]:
    """File names of the shards, each with the tensors that the index assigns to it (None: there is no index)."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        if not (path / "model.safetensors").is_file():
            raise CheckpointInvalid(_no_weights(path))
        yield "model.safetensors", None
        return
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointInvalid(f"{index} has no weight_map: copy the checkpoint again")
    by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointInvalid(f"{index} puts {name[:80]!r} into {str(shard)[:80]!r}, which names no shard")
        by_shard.setdefault(shard, []).append(name)
    yield from by_shard.items()


def _open_shard(path: Path) -> tuple[Any, dict[str, _Stored]]:
    if not path.is_file():
        raise CheckpointInvalid(f"{path} is in the index, but missing: copy the checkpoint again")
    try:
        shard: Any = safe_open(path, framework="pt")
        tensors = {}
        for name in shard.keys():  # noqa: SIM118
            piece = shard.get_slice(name)
            kind = piece.get_dtype()
            if kind not in _DTYPES:
                raise CheckpointInvalid(f"{path}: {name} has dtype {kind}: only unquantized checkpoints are supported")
            tensors[name] = _Stored(path.name, tuple(piece.get_shape()), _DTYPES[kind])
    except (SafetensorError, OSError) as error:
        raise CheckpointInvalid(f"{path} is not a safetensors file: {error}") from error
    return shard, tensors


def refuse_code(settings: Path) -> None:
    """Raise CheckpointInvalid when this JSON file, if it exists, names Python code to load."""
    if settings.is_file() and _read_json(settings).get("auto_map"):
        raise CheckpointInvalid(f"{settings} has an auto_map: it wants to run code of its own, which is refused")


def _no_weights(path: Path) -> str:
    if any(file.suffix in _PICKLES for file in path.iterdir()):
        return f"{path} has pickled weights, which can run code: convert them to safetensors with save_pretrained()"
    return f"{path} has neither model.safetensors nor model.safetensors.index.json"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointInvalid(f"{path} is larger than {_MAX_JSON >> 20} MiB")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{path} is not a JSON object")
    return value
