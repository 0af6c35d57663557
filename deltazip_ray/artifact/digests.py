"""Checks bytes against a manifest. Without torch, as the host tier uses it too."""

import hashlib

from deltazip_ray.artifact.manifest import BlobEntry, FileEntry, StoredForm
from deltazip_ray.errors import BlobCorrupt


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """The sha256 of ``data`` in hex; releases the GIL."""
    return hashlib.sha256(data).hexdigest()


class Verifier:
    """Checks bytes against a manifest's digest as they arrive."""

    def __init__(self, entry: BlobEntry | StoredForm) -> None:
        self._entry = entry
        self._found = hashlib.sha256()

    def update(self, piece: memoryview) -> None:
        """Take the next bytes; releases the GIL."""
        self._found.update(piece)

    def check(self) -> None:
        """Raise BlobCorrupt unless the bytes match the manifest's digest."""
        if self._found.hexdigest() != self._entry.digest:
            raise _other_digest(self._entry)


def verify_blob(data: bytes | bytearray | memoryview, entry: BlobEntry | FileEntry | StoredForm) -> None:
    """Raise BlobCorrupt unless ``data`` has the size and the sha256 of ``entry``."""
    size = memoryview(data).nbytes
    if size != entry.size:
        raise BlobCorrupt(
            f"blob {entry.digest[:12]} has {size} bytes, not {entry.size}: publish the version again with --repair"
        )
    if sha256_hex(data) != entry.digest:
        raise _other_digest(entry)


def _other_digest(entry: BlobEntry | FileEntry | StoredForm) -> BlobCorrupt:
    return BlobCorrupt(
        f"the bytes of blob {entry.digest[:12]} do not match its digest: publish the version again with --repair"
    )
