"""What a compression has finished, so that one that broke off goes on from there.

``journal.json`` lies beside the artifact until its manifest does. It names the inputs and the options by one digest; a
journal of others is not used.
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
    """One decoder block that is done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blob: BlobEntry | None
    """None when the fine-tune left the block alone, or nothing of it was worth its bytes."""
    error: float = Field(ge=0, allow_inf_nan=False)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    codings: dict[str, Coding] | None = None
    blocks: tuple[Finished, ...] = ()


class Journal:
    """The journal beside one artifact. Every method raises StoreError."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        """Read what is there. ``key`` is :func:`resume_key`."""
        self._store = store
        self._record = _Record(key=key)
        with suppress(ObjectNotFound, ValidationError):
            found = _Record.model_validate_json(store.get(JOURNAL, MAX_MANIFEST))
            if found.key == key:
                self._record = found

    @property
    def codings(self) -> dict[str, Coding] | None:
        """What bit allocation chose, if it came that far."""
        return self._record.codings

    def finished(self, index: int) -> Finished | None:
        """Block ``index``, if it is done."""
        return self._record.blocks[index] if index < len(self._record.blocks) else None

    def keep_codings(self, codings: Mapping[str, Coding]) -> None:
        """Note what bit allocation chose."""
        self._write(codings=dict(codings))

    def keep_block(self, index: int, block: Finished) -> None:
        """Note that ``index`` is done, the blob being in the store; later blocks are to be done again."""
        self._write(blocks=(*self._record.blocks[:index], block))

    def close(self) -> None:
        """Forget everything: the artifact is whole."""
        self._store.delete(JOURNAL)

    def _write(self, **changes: object) -> None:
        self._record = self._record.model_copy(update=changes)
        self._store.put(JOURNAL, self._record.model_dump_json().encode())


def resume_key(pair: Pair, base: str, options: CompressOptions) -> str:
    """Digest of all that the blobs follow from: both checkpoints, the options, the calibration file, the libraries.

    ``base`` is the base's digest. Reads the whole fine-tune. Bounds on quality may change between two runs.
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
    """The sha256 of a file; of nothing when it cannot be read, which its reader will tell."""
    return hashlib.sha256(file.read_bytes() if file.is_file() else b"").hexdigest()
