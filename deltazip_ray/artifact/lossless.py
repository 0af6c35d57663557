"""Lossless compression: stores hold blobs compressed by zstandard if that pays; memory and disk hold them as they are.

Codes are nearly random, so entropy coding is all there is to gain, and higher levels of zstandard gain no more.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, cast

import zstandard

from deltazip_ray.artifact.digests import sha256_hex, verify_blob
from deltazip_ray.artifact.manifest import BlobEntry, FileEntry, StoredForm
from deltazip_ray.artifact.object_store import ObjectStore
from deltazip_ray.config import MIB
from deltazip_ray.errors import BlobCorrupt

LEVEL = 3
MOST = 0.97
"""A blob is stored uncompressed unless compression brings it below this share of its size."""


def encode(data: bytes) -> tuple[bytes, StoredForm | None]:
    """The bytes to store for a blob, and the manifest's entry for them; None: the blob is stored as it is."""
    smaller = zstandard.ZstdCompressor(level=LEVEL).compress(data)
    if len(smaller) > MOST * len(data):
        return data, None
    return smaller, StoredForm(encoding="zstd", digest=sha256_hex(smaller), size=len(smaller))


def decode(pieces: Iterable[memoryview], buffer: memoryview, entry: BlobEntry) -> Iterator[memoryview]:
    """Decompress a blob into ``buffer``, of ``entry.size`` bytes, while ``pieces`` of its stored form arrive.

    Yields the parts of ``buffer`` in order, each as soon as it is filled. Never writes beyond ``buffer``, whatever size
    the stored form claims. Does not check the digest. Raises BlobCorrupt.
    """
    position = 0
    advice = "publish the version again with --repair"
    with _damage(f"blob {entry.object_digest[:12]} does not decompress to {len(buffer)} bytes: {advice}"):
        reader = zstandard.ZstdDecompressor().stream_reader(cast("IO[bytes]", _File(pieces)), read_across_frames=True)
        while count := reader.readinto(buffer[position : position + MIB]):
            yield buffer[position : position + count]
            position += count
        if position != len(buffer) or reader.read(1):
            raise BlobCorrupt("it is shorter or longer")


class _File:
    """Pieces as the file that zstandard reads from; it accepts reads of any size."""

    def __init__(self, pieces: Iterable[memoryview]) -> None:
        self._pieces = iter(pieces)

    def read(self, _size: int) -> memoryview | bytes:
        """The next piece; empty at the end."""
        return next(self._pieces, b"")


def read_object(store: ObjectStore, key: str, entry: BlobEntry | FileEntry) -> bytes:
    """A blob or file of an artifact as it is stored, after checking that it decompresses to what ``entry`` describes.

    Raises BlobCorrupt, ObjectNotFound, StoreUnavailable.
    """
    return _read(store, key, entry)[0]


def read_verified(store: ObjectStore, key: str, entry: BlobEntry | FileEntry) -> bytes | bytearray:
    """A blob or file, decompressed and checked against ``entry``; raises as :func:`read_object`."""
    return _read(store, key, entry)[1]


def _read(store: ObjectStore, key: str, entry: BlobEntry | FileEntry) -> tuple[bytes, bytes | bytearray]:
    with _damage(f"{store.url}/{key} is not what its manifest says: make the artifact again, or copy it again"):
        # Ask the store for the size: a manifest may claim anything, and that much memory would be allocated.
        if store.size(key) != entry.object_size:
            raise BlobCorrupt(f"it does not have {entry.object_size} bytes")
        data = store.get(key, entry.object_size)
        if isinstance(entry, FileEntry) or entry.stored_as is None:
            verify_blob(data, entry)
            return data, data
        verify_blob(data, entry.stored_as)
        whole = bytearray()  # not allocated at once: the manifest's size may be wrong
        for chunk in zstandard.ZstdDecompressor().read_to_iter(data):
            whole += chunk
            if len(whole) > entry.size:
                break
        verify_blob(whole, entry)
        return data, whole


@contextmanager
def _damage(told: str) -> Iterator[None]:
    """Report any damage as ``told``: a published version is repaired in another way than an artifact."""
    try:
        yield
    except (BlobCorrupt, zstandard.ZstdError) as error:
        raise BlobCorrupt(told) from error
