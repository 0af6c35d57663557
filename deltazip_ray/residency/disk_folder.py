"""A bounded folder of blobs, named by digest and size."""

import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from deltazip_ray.artifact.object_store import PART
from deltazip_ray.errors import BlobCorrupt
from deltazip_ray.residency.quarantine import BlobKey

_NAME = re.compile(r"([0-9a-f]{64})-([0-9]{1,19})")
_PARTIAL = ".partial"
_CLAIM = ".lock"


class DiskFolder:
    """At most ``limit`` bytes of files, evicted least recently used first.

    Thread-safe, except that only one thread at a time may :meth:`write`. Blocking; every method raises OSError. The
    folder belongs to one process until that process ends; others get BlockingIOError. Each use sets a file's
    modification time, so that a later process knows the order. Files with other names are left alone.
    """

    def __init__(self, root: Path, limit: int) -> None:
        """Touches nothing yet: the folder is created, locked and read at the first use."""
        self.root = root
        self._limit = limit
        self._lock = threading.Lock()
        self._claim: int | None = None
        self._files: dict[BlobKey, None] = {}  # least recently used first
        self.bytes = 0
        """Total size of the files."""
        self.evictions = 0
        """Files evicted since the start."""

    def __len__(self) -> int:
        """Number of files."""
        return len(self._files)

    def __contains__(self, key: object) -> bool:
        """Whether the file is known to exist."""
        return key in self._files

    def find(self, digest: str) -> BlobKey | None:
        """The key of the file with this digest. Linear in the number of files."""
        with self._lock:
            self._use()
            return next((key for key in self._files if key[0] == digest), None)

    def read_into(
        self, key: BlobKey, buffer: memoryview, arrived: Callable[[memoryview], object] = lambda _: None
    ) -> bool:
        """Fill ``buffer``, of the blob's size, with the file's bytes, unverified; False when there is no such file.

        ``arrived`` is called with each piece, in order. Raises BlobCorrupt when the file's size contradicts its name.
        """
        with self._lock:
            self._use()
            if key not in self._files:
                return False
            try:
                file = self._path(key).open("rb", buffering=0)  # stays readable if it is evicted meanwhile
            except FileNotFoundError:
                self._forget(key)
                return False
            self._files[key] = self._files.pop(key)
        with file:
            now = time.time_ns()  # finer than the kernel's own timestamps
            os.utime(file.fileno(), ns=(now, now))
            size, position = os.fstat(file.fileno()).st_size, 0
            while position < size == len(buffer) and (count := file.readinto(buffer[position : position + PART])):
                arrived(buffer[position : position + count])
                position += count
        if not position == size == len(buffer):
            raise BlobCorrupt(f"{self._path(key)} has {size} bytes, not {len(buffer)}")
        return True

    def write(self, key: BlobKey, chunks: Iterable[bytes]) -> bool:
        """Write a blob; False, and no file, when ``chunks`` do not match its digest or it exceeds the limit."""
        digest, size = key
        with self._lock:
            self._use()
            if size > self._limit:
                return False
            if key in self._files:
                return True
            self._evict(self._limit - size)
        partial = self.root / _PARTIAL
        found = hashlib.sha256()
        try:
            # Not flushed: a file that a power failure truncated is detected when it is read.
            with partial.open("wb", buffering=0) as file:
                for chunk in chunks:
                    found.update(chunk)
                    _write_all(file.fileno(), chunk)
            if found.hexdigest() != digest:
                return False
            partial.replace(self._path(key))
        finally:
            partial.unlink(missing_ok=True)
        with self._lock:
            self._files[key] = None
            self.bytes += size
        return True

    def remove(self, key: BlobKey) -> None:
        """Remove a file if it exists."""
        with self._lock:
            self._use()
            if key in self._files:
                self._forget(key)
                self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Release the folder to other processes; a later use locks it again."""
        with self._lock:
            self._let_go()

    def _use(self) -> None:
        """Make sure that this process has locked the folder and knows its files."""
        if self._claim is not None:
            if os.fstat(self._claim).st_nlink:
                return
            self._let_go()  # somebody removed the folder
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        claim = os.open(self.root / _CLAIM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._find_files()
        except BlockingIOError as error:
            os.close(claim)
            raise BlockingIOError(error.errno, "another process uses the folder") from error
        except OSError:
            os.close(claim)
            raise
        self._claim = claim

    def _let_go(self) -> None:
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _find_files(self) -> None:
        """List the folder, and remove truncated files."""
        found: list[tuple[int, BlobKey]] = []
        with os.scandir(self.root) as entries:
            for entry in entries:
                name = _NAME.fullmatch(entry.name)
                if name is None or not entry.is_file(follow_symlinks=False):
                    continue
                status = entry.stat(follow_symlinks=False)
                if status.st_size == int(name[2]):
                    found.append((status.st_mtime_ns, (name[1], int(name[2]))))
                else:
                    Path(entry.path).unlink(missing_ok=True)
        (self.root / _PARTIAL).unlink(missing_ok=True)
        self._files = {key: None for _, key in sorted(found)}
        self.bytes = sum(size for _, size in self._files)
        self._evict(self._limit)

    def _evict(self, limit: int) -> None:
        while self.bytes > limit:
            key = next(iter(self._files))
            self._path(key).unlink(missing_ok=True)
            self._forget(key)
            self.evictions += 1

    def _forget(self, key: BlobKey) -> None:
        del self._files[key]
        self.bytes -= key[1]

    def _path(self, key: BlobKey) -> Path:
        return self.root / f"{key[0]}-{key[1]}"


def _write_all(descriptor: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
