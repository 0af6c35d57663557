"""What the artifact code asks of a place that keeps objects by key."""

import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing

from deltazip_ray.errors import InvalidName

MAX_OBJECT = 64 << 20
"""Bytes that :meth:`ObjectStore.get` reads at most unless told otherwise."""

PART = 8 << 20
"""Bytes of a large object that are read in one piece."""

Pieces = Generator[memoryview, None, None]
"""Pieces of a buffer in the order of the bytes, each when it is there, while others are on their way."""

_MAX_KEY = 900
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class ObjectStore(ABC):
    """Objects by key, below one root. Blocking and thread-safe.

    A key is segments of letters, digits, ``.``, ``_`` and ``-`` joined by ``/``; other keys raise InvalidName before
    they get near a path or a request. An object is visible whole or not at all.
    Every method raises StoreUnavailable when the store does not answer or refuses access.
    """

    url: str
    """The root, for messages; holds no credentials."""

    @abstractmethod
    def create(self) -> None:
        """Make the root where there may be none and this process may make it: a folder, but nobody's bucket.

        Whoever writes first calls it. A root that is not there is otherwise StoreUnavailable, not an empty store.
        """

    @abstractmethod
    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        """An object's bytes. Raises ObjectNotFound, and StoreError when it is larger than ``limit`` bytes."""

    @abstractmethod
    def size(self, key: str) -> int:
        """An object's size in bytes; raises ObjectNotFound."""

    @abstractmethod
    def pieces(self, key: str, buffer: memoryview) -> Pieces:
        """Fill ``buffer`` with an object of exactly its size, in parallel where that helps; the pieces are all of it.

        Raises ObjectNotFound, and BlobCorrupt when the object has another size; ``buffer`` is undefined after both.
        Whoever leaves half-way must close the generator: nobody writes into ``buffer`` after that, nor after an error.
        """

    def read_into(self, key: str, buffer: memoryview) -> None:
        """Fill ``buffer`` as :meth:`pieces` does, all of it."""
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
        """Remove an object; it is no error if there is none."""


def is_key(key: str) -> bool:
    """Whether ``key`` is well formed."""
    return len(key) <= _MAX_KEY and all(_SEGMENT.fullmatch(segment) for segment in key.split("/"))


def check_key(key: str) -> str:
    """Return ``key`` when it is well formed, else raise InvalidName."""
    if not is_key(key):
        raise InvalidName(f"{key[:120]!r} is not an object's key: use letters, digits, '.', '_', '-' and '/' between")
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` when keys may start with it, else raise InvalidName."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix
