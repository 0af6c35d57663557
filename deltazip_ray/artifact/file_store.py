"""A store in a folder."""

import errno
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from deltazip_ray.artifact.object_store import MAX_OBJECT, PART, ObjectStore, Pieces, check_key, check_prefix
from deltazip_ray.errors import (
    BlobCorrupt,
    ConfigError,
    ObjectNotFound,
    StoreError,
    StoreFull,
    StoreUnavailable,
)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_PARTIAL = ".partial"


class FileStore(ObjectStore):
    """Objects are files below ``root``, a folder that :meth:`create` makes.

    A file is written under ``root/.partial``, flushed to disk and then moved into place, so that a reader never sees a
    partial file and a crash leaves at most a hidden one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = self.root.as_uri()

    @classmethod
    def from_url(cls, url: str) -> "FileStore":
        """The store of a ``file:///path`` URL; raises ConfigError."""
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} is not a folder's URL: write file:///absolute/path")
        return cls(Path(unquote(parts.path)))

    def create(self) -> None:
        with self._translated(""):
            self.root.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        with self._reading(key), self._path(key).open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise StoreError(f"{self.url}/{key} is larger than {limit} bytes: it is not what its name says")
        return data

    def size(self, key: str) -> int:
        with self._reading(key), self._path(key).open("rb") as file:
            return os.fstat(file.fileno()).st_size

    def pieces(self, key: str, buffer: memoryview) -> Pieces:
        with self._reading(key), self._path(key).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            position = 0
            while position < size == len(buffer) and (count := file.readinto(buffer[position : position + PART])):
                yield buffer[position : position + count]
                position += count
        if not position == size == len(buffer):
            raise BlobCorrupt(f"{self.url}/{key} has {size} bytes, not {len(buffer)}: publish it again with --repair")

    def put(self, key: str, data: bytes) -> None:
        target = self._path(key)
        partial = self.root / _PARTIAL / uuid.uuid4().hex
        with self._translated(key):
            partial.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(target)
                _sync_folder(target.parent)
            finally:
                partial.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        with self._translated(key):
            return self._path(key).is_file()

    def list(self, prefix: str = "") -> Sequence[str]:
        start = self.root / check_prefix(prefix).rpartition("/")[0]
        keys = []
        with self._translated(prefix):
            self._check_root()
            for folder, folders, files in os.walk(start, onerror=_raise_unless_absent):
                folders[:] = [name for name in folders if not name.startswith(".")]
                below = Path(folder).relative_to(self.root)
                keys += [(below / name).as_posix() for name in files if not name.startswith(".")]
        return sorted(key for key in keys if key.startswith(prefix))

    def folders(self) -> Sequence[str]:
        with self._translated(""):
            self._check_root()
            found = (entry.name for entry in self.root.iterdir() if entry.is_dir())
            return sorted(name for name in found if not name.startswith("."))

    def delete(self, key: str) -> None:
        with self._translated(key):
            path = self._path(key)
            if path.is_file():
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _check_root(self) -> None:
        if not self.root.is_dir():
            raise StoreUnavailable(
                f"there is no folder {self.url}: mount it, or correct the path "
                "(`deltazip compress` and `deltazip publish` make new ones)"
            )

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        with self._translated(key):
            try:
                yield
            except _ABSENT as error:
                self._check_root()
                raise ObjectNotFound(f"{self.url} has no {key}") from error

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{self.url}/{key}: {error.strerror}"
            if error.errno in _FULL:
                raise StoreFull(f"no room for {where}: free space, or use another store") from error
            raise StoreUnavailable(f"cannot use {where}: check the disk and the permissions") from error


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, _ABSENT):
        raise error


def _sync_folder(folder: Path) -> None:
    """Make a new name in ``folder`` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
