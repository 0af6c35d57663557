"""Records the progress of a compression, so that an interrupted one can be resumed.

``journal.json`` is beside the blobs until the manifest is written. It identifies inputs and options by a digest; a
journal with another digest is ignored.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltazip_kernels.layout import LAYOUT_VERSION
from deltazip_ray.artifact.checkpoint import base_digest
from deltazip_ray.artifact.manifest import MAX_MANIFEST, BlobEntry
from deltazip_ray.artifact.object_store import ObjectStore
from deltazip_ray.compress.options import Coding, CompressOptions
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.errors import ObjectNotFound

JOURNAL = "journal.json"


class Finished(BaseModel):
    """A finished decoder block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blob: BlobEntry | None
    """None when the block is unchanged, or all of its changes are absent by choice."""
    error: float = Field(ge=0, allow_inf_nan=False)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    codings: dict[str, Coding] | None = None
    blocks: tuple[Finished, ...] = ()


class Journal:
    """The journal beside one artifact. Every method raises StoreError."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        """Read the journal if there is one. ``key`` is :func:`resume_key`."""
        self._store = store
        self._record = _Record(key=key)
        with suppress(ObjectNotFound, ValidationError):
            found = _Record.model_validate_json(store.get(JOURNAL, MAX_MANIFEST))
            if found.key == key:
                self._record = found

    @property
    def codings(self) -> dict[str, Coding] | None:
        """The result of bit allocation, if there is one."""
        return self._record.codings

    def finished(self, index: int) -> Finished | None:
        """Block ``index``, if it is finished."""
        return self._record.blocks[index] if index < len(self._record.blocks) else None

    def keep_codings(self, codings: Mapping[str, Coding]) -> None:
        """Record the result of bit allocation."""
        self._write(codings=dict(codings))

    def keep_block(self, index: int, block: Finished) -> None:
        """Record that block ``index`` is finished and its blob is in the store; records of later blocks are dropped."""
        self._write(blocks=(*self._record.blocks[:index], block))

    def close(self) -> None:
        """Delete the journal: the artifact is complete."""
        self._store.delete(JOURNAL)

    def _write(self, **changes: object) -> None:
        self._record = self._record.model_copy(update=changes)
        self._store.put(JOURNAL, self._record.model_dump_json().encode())


def resume_key(pair: Pair, base: str, options: CompressOptions) -> str:
    """Digest of everything that the blobs depend on: both checkpoints, the options, the calibration file, torch.

    ``base`` is the base's digest. Reads the whole fine-tune. Bounds on quality (``require``) are not part of it.
    """
    parts = [
        base,
        base_digest(pair.finetuned),
        options.model_dump_json(exclude={"require", "calibration"}),
        f"layout {LAYOUT_VERSION}, torch {torch.__version__}",
    ]
    parts += [f"{name} {_digest(file)}" for name, file in sorted(pair.finetuned.files.items())]
    if options.calibration is not None:
        parts.append(f"{options.calibration.name} {_digest(options.calibration)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest(file: Path) -> str:
    """The sha256 of a file; that of nothing if it does not exist, which is reported when it is read."""
    return hashlib.sha256(file.read_bytes() if file.is_file() else b"").hexdigest()
