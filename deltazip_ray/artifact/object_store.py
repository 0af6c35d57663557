"""The interface of a store: objects by key."""

import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing

from deltazip_ray.errors import InvalidName

MAX_OBJECT = 64 << 20
"""Default limit of :meth:`ObjectStore.get` in bytes."""

PART = 8 << 20
"""Large objects are read in pieces of this many bytes."""

Pieces = Generator[memoryview, None, None]
"""Yields the pieces of a buffer in order, each as soon as it is filled, while later ones are still being read."""

_MAX_KEY = 900
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class ObjectStore(ABC):
    """Objects by key, below one root. Blocking and thread-safe.

    A key is segments of letters, digits, ``.``, ``_`` and ``-`` joined by ``/``; other keys raise InvalidName before
    they are used in a path or a request. A write is atomic: readers see the whole object or none.
    Every method raises StoreUnavailable when the store does not answer or refuses access.
    """

    url: str
    """The root, for messages; contains no credentials."""

    @abstractmethod
    def create(self) -> None:
        """Create the root if it does not exist: a folder, but never a bucket. Call it before the first write.

        Otherwise a missing root raises StoreUnavailable; it is not taken for an empty store.
        """

    @abstractmethod
    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        """An object's bytes. Raises ObjectNotFound, and StoreError when it is larger than ``limit`` bytes."""

    @abstractmethod
    def size(self, key: str) -> int:
        """An object's size in bytes; raises ObjectNotFound."""

    @abstractmethod
    def pieces(self, key: str, buffer: memoryview) -> Pieces:
        """Fill ``buffer`` with an object of exactly its size, in parallel where that helps. The pieces cover all of it.

        Raises ObjectNotFound, and BlobCorrupt when the object has another size; the content of ``buffer`` is undefined
        then. A caller that stops early must close the generator. After that, as after an error, nothing writes into
        ``buffer`` any more.
        """

    def read_into(self, key: str, buffer: memoryview) -> None:
        """Fill ``buffer`` as :meth:`pieces` does, and return when it is full."""
        with closing(self.pieces(key, buffer)) as pieces:
            for _ in pieces:
                pass

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write an object, replacing what was there. Raises StoreFull."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    @abstractmethod
    def list(self, prefix: str = "") -> Sequence[str]:
        """The keys that start with ``prefix``, sorted."""

    @abstractmethod
    def folders(self) -> Sequence[str]:
        """The first segments of all keys that have more than one, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object if it exists."""


def is_key(key: str) -> bool:
    """Whether ``key`` is well formed."""
    return len(key) <= _MAX_KEY and all(_SEGMENT.fullmatch(segment) for segment in key.split("/"))


def check_key(key: str) -> str:
    """Return ``key`` when it is well formed, else raise InvalidName."""
    if not is_key(key):
        raise InvalidName(f"{key[:120]!r} is not an object's key: use letters, digits, '.', '_', '-', separated by '/'")
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` when keys may start with it, else raise InvalidName."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix
