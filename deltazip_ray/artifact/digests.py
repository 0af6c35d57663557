"""Whether bytes are those that a manifest names. Knows no torch: the host tier checks blobs too."""

import hashlib

from deltazip_ray.artifact.manifest import BlobEntry, FileEntry, StoredForm
from deltazip_ray.errors import BlobCorrupt


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """The sha256 of ``data`` in hex; other threads run meanwhile."""
    return hashlib.sha256(data).hexdigest()


class Verifier:
    """Checks bytes against a manifest's digest while they arrive."""

    def __init__(self, entry: BlobEntry | StoredForm) -> None:
        self._entry = entry
        self._found = hashlib.sha256()

    def update(self, piece: memoryview) -> None:
        """The next bytes; other threads run meanwhile."""
        self._found.update(piece)

    def check(self) -> None:
        """Raise BlobCorrupt unless the bytes were those that the manifest names."""
        if self._found.hexdigest() != self._entry.digest:
            raise _other_digest(self._entry)


def verify_blob(data: bytes | bytearray | memoryview, entry: BlobEntry | FileEntry | StoredForm) -> None:
    """Raise BlobCorrupt unless ``data`` has the size and the sha256 that ``entry`` names."""
    size = memoryview(data).nbytes
    if size != entry.size:
        raise BlobCorrupt(
            f"blob {entry.digest[:12]} has {size} bytes, not {entry.size}: publish the version again with --repair"
        )
    if sha256_hex(data) != entry.digest:
        raise _other_digest(entry)


def _other_digest(entry: BlobEntry | FileEntry | StoredForm) -> BlobCorrupt:
    return BlobCorrupt(
        f"blob {entry.digest[:12]} has another digest than its name: publish the version again with --repair"
    )
