"""An artifact on its own: one version in a folder or under a prefix, as the compressor writes it.

``manifest.json`` beside ``blobs/sha256/<digest>``. The manifest is written last: an artifact that has one is complete.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from deltazip_ray.artifact.blob import read_blob, write_blob
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.lossless import encode, read_verified
from deltazip_ray.artifact.manifest import (
    MAX_MANIFEST,
    BaseRef,
    BlobEntry,
    FileEntry,
    Manifest,
    Quality,
    TensorEntry,
    blob_key,
    parse_manifest,
)
from deltazip_ray.artifact.store import ObjectStore, open_store
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import ManifestInvalid, ObjectNotFound

MANIFEST = "manifest.json"


class ArtifactWriter:
    """Collects the blobs and files of one version; :meth:`finish` makes it an artifact."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._blobs: dict[str, BlobEntry] = {}
        self._files: dict[str, FileEntry] = {}

    def add_blob(
        self, block: str, tensors: Mapping[str, torch.Tensor], entries: Mapping[str, TensorEntry]
    ) -> BlobEntry:
        """Store the tensors of ``block``; ``entries`` says for each weight how it is coded.

        Raises BlobCorrupt when the tensors do not match ``entries``, and StoreError.
        """
        data = write_blob(tensors)
        stored, form = encode(data)
        entry = BlobEntry(block=block, digest=sha256_hex(data), size=len(data), tensors=dict(entries), stored_as=form)
        read_blob(data, entry)
        self._put(entry, stored)
        self._blobs[block] = entry
        return entry

    def adopt_blob(self, entry: BlobEntry) -> None:
        """Add a blob that an earlier run has already put into the store."""
        self._blobs[entry.block] = entry

    def add_file(self, name: str, data: bytes) -> FileEntry:
        """Store a small file that travels with the version; raises StoreError."""
        entry = FileEntry(digest=sha256_hex(data), size=len(data))
        self._put(entry, data)
        self._files[name] = entry
        return entry

    def finish(
        self,
        *,
        layout_version: int,
        base: BaseRef,
        bytes_finetuned: int,
        added_tokens: int = 0,
        quality: Quality | None = None,
    ) -> Manifest:
        """Write the manifest of what was added and return it; raises StoreError."""
        manifest = Manifest(
            layout_version=layout_version,
            base=base,
            added_tokens=added_tokens,
            bytes_finetuned=bytes_finetuned,
            blobs=tuple(sorted(self._blobs.values(), key=_block_order)),
            files=self._files,
            quality=quality,
        )
        self._store.put(MANIFEST, manifest.canonical())
        return manifest

    def _put(self, entry: BlobEntry | FileEntry, data: bytes) -> None:
        self._store.put(blob_key(entry.object_digest), data)


def open_artifact(location: str | Path | StoreConfig) -> tuple[Manifest, ObjectStore]:
    """The manifest of the artifact at a folder, ``file://`` or ``s3://`` URL, and the store of its blobs.

    Raises ManifestInvalid when there is none, and StoreError.
    """
    store = open_store(location if isinstance(location, StoreConfig) else StoreConfig.at(location))
    try:
        raw = store.get(MANIFEST, MAX_MANIFEST)
    except ObjectNotFound:
        raise ManifestInvalid(f"{store.url} has no {MANIFEST}: give the --out of `deltazip compress`") from None
    return parse_manifest(raw), store


def verify_artifact(manifest: Manifest, store: ObjectStore, progress: Callable[[int], None] | None = None) -> None:
    """Read every blob and file and check digests and contents. ``progress`` gets the size of each one when it is done.

    Raises BlobCorrupt for the first one that differs from the manifest, ObjectNotFound and StoreUnavailable.
    """
    for entry in manifest.stored:
        data = read_verified(store, blob_key(entry.object_digest), entry)
        if isinstance(entry, BlobEntry):
            read_blob(data, entry)
        if progress is not None:
            progress(entry.object_size)


def _block_order(entry: BlobEntry) -> tuple[bool, int]:
    """Decoder blocks by number, then the rest."""
    kind, _, number = entry.block.partition(".")
    return kind != "layers", int(number or 0)
