"""Whether bytes are those that a manifest names. Knows no torch: the host tier checks blobs too."""

import hashlib

from deltazip_ray.artifact.manifest import BlobEntry, FileEntry, StoredForm
from deltazip_ray.errors import BlobCorrupt


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """The sha256 of ``data`` in hex; other threads run meanwhile."""
    return hashlib.sha256(data).hexdigest()


def verify_blob(data: bytes | bytearray | memoryview, entry: BlobEntry | FileEntry | StoredForm) -> None:
    """Raise BlobCorrupt unless ``data`` has the size and the sha256 that ``entry`` names."""
    size = memoryview(data).nbytes
    if size != entry.size:
        raise BlobCorrupt(
            f"blob {entry.digest[:12]} has {size} bytes, not {entry.size}: publish the version again with --repair"
        )
    if sha256_hex(data) != entry.digest:
        raise BlobCorrupt(
            f"blob {entry.digest[:12]} has another digest than its name: publish the version again with --repair"
        )
