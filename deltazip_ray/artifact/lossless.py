"""The lossless stage: blobs lie in stores compressed by zstandard where that pays, and are whole in memory and on disk.

Codes are nearly random, so what there is to gain is what entropy coding gains; the highest levels gain no more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

import zstandard

from deltazip_ray.artifact.digests import sha256_hex, verify_blob
from deltazip_ray.artifact.manifest import BlobEntry, FileEntry, StoredForm
from deltazip_ray.artifact.object_store import Arrived, ObjectStore, ignore
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


class Decoding:
    """A blob that is decompressed while its stored form arrives.

    Nothing is written beyond ``buffer``, whatever the stored form says of itself. The digest is not checked.
    """

    def __init__(self, buffer: memoryview, entry: BlobEntry, arrived: Arrived = ignore) -> None:
        """``buffer`` has ``entry.size`` bytes; ``arrived`` is told of those that are there."""
        self._buffer = buffer
        self._entry = entry
        self._arrived = arrived
        self._position = 0
        self._decompressor = zstandard.ZstdDecompressor().stream_writer(cast("IO[bytes]", self), closefd=False)

    def update(self, piece: memoryview) -> None:
        """The next bytes of the stored form. Raises BlobCorrupt."""
        with _refused(self._entry):
            self._decompressor.write(piece)

    def write(self, data: bytes) -> int:
        """What the decompressor calls with some bytes of the blob. Raises BlobCorrupt."""
        here = slice(self._position, self._position + len(data))
        if here.stop > len(self._buffer):
            raise self._wrong_size()
        self._buffer[here] = data
        self._arrived(self._buffer[here])
        self._position = here.stop
        return len(data)

    def finish(self) -> None:
        """That was all. Raises BlobCorrupt when it does not make the blob."""
        if self._position != len(self._buffer):
            raise self._wrong_size()

    def _wrong_size(self) -> BlobCorrupt:
        return BlobCorrupt(
            f"blob {self._entry.object_digest[:12]} has not {len(self._buffer)} bytes when it is decompressed: "
            "publish the version again with --repair"
        )


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
