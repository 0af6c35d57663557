"""The lossless stage: blobs lie in stores compressed by zstandard where that pays, and are whole in memory and on disk.

Codes are nearly random, so what there is to gain is what entropy coding gains; the highest levels gain no more.
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
"""Of the size before: what does not become at least this small is stored as it is."""


def encode(data: bytes) -> tuple[bytes, StoredForm | None]:
    """What to store of a blob, and how to say so in its manifest; None: it is stored as it is."""
    smaller = zstandard.ZstdCompressor(level=LEVEL).compress(data)
    if len(smaller) > MOST * len(data):
        return data, None
    return smaller, StoredForm(encoding="zstd", digest=sha256_hex(smaller), size=len(smaller))


def decode(pieces: Iterable[memoryview], buffer: memoryview, entry: BlobEntry) -> Iterator[memoryview]:
    """Decompress a blob into ``buffer``, of ``entry.size`` bytes, while ``pieces`` of its stored form arrive.

    Gives the parts of ``buffer`` in their order, each when it is there. Nothing is written beyond ``buffer``, whatever
    the stored form says of itself. The digest is not checked. Raises BlobCorrupt.
    """
    position = 0
    with _refused(entry):
        reader = zstandard.ZstdDecompressor().stream_reader(cast("IO[bytes]", _File(pieces)), read_across_frames=True)
        while count := reader.readinto(buffer[position : position + MIB]):
            yield buffer[position : position + count]
            position += count
        if position == len(buffer) and not reader.read(1):
            return
    raise BlobCorrupt(
        f"blob {entry.object_digest[:12]} has not {len(buffer)} bytes when it is decompressed: "
        "publish the version again with --repair"
    )


class _File:
    """Pieces as zstandard reads a file: one after the other, of whatever size."""

    def __init__(self, pieces: Iterable[memoryview]) -> None:
        self._pieces = iter(pieces)

    def read(self, _size: int) -> memoryview | bytes:
        """The next piece; empty at the end."""
        return next(self._pieces, b"")


def read_object(store: ObjectStore, key: str, entry: BlobEntry | FileEntry) -> bytes:
    """A blob or file as it is stored, if that makes what ``entry`` says.

    Raises BlobCorrupt, ObjectNotFound, StoreUnavailable.
    """
    return _read(store, key, entry)[0]


def read_verified(store: ObjectStore, key: str, entry: BlobEntry | FileEntry) -> bytes | bytearray:
    """A blob or file that is what ``entry`` says, decompressed; raises as :func:`read_object`."""
    return _read(store, key, entry)[1]


def _read(store: ObjectStore, key: str, entry: BlobEntry | FileEntry) -> tuple[bytes, bytes | bytearray]:
    # The store knows how large it is: a manifest may say anything, and that much memory would be taken.
    if store.size(key) != entry.object_size:
        raise BlobCorrupt(
            f"{store.url}/{key} does not have the {entry.object_size} bytes of its manifest: make it again"
        )
    data = store.get(key, entry.object_size)
    if isinstance(entry, FileEntry) or entry.stored_as is None:
        verify_blob(data, entry)
        return data, data
    verify_blob(data, entry.stored_as)
    whole = bytearray()  # which grows, for a manifest may say anything
    with _refused(entry):
        for chunk in zstandard.ZstdDecompressor().read_to_iter(data):
            whole += chunk
            if len(whole) > entry.size:
                break
    verify_blob(whole, entry)
    return data, whole


@contextmanager
def _refused(entry: BlobEntry) -> Iterator[None]:
    try:
        yield
    except zstandard.ZstdError as error:
        raise BlobCorrupt(
            f"blob {entry.object_digest[:12]} cannot be decompressed ({error}): publish the version again with --repair"
        ) from error
