"""Blobs that came damaged however often they were fetched: for a while they are refused without a fetch."""

import time
from collections.abc import Callable, Iterable

from deltazip_ray.artifact.manifest import BlobEntry
from deltazip_ray.errors import BlobCorrupt

BlobKey = tuple[str, int]
"""Digest and size: a manifest that is wrong about a size must not harm one that is right."""


def blob_key(entry: BlobEntry) -> BlobKey:
    """What makes two blobs the same."""
    return entry.digest, entry.size


class Quarantine:
    """Blobs by when they may be fetched again, which is found out by fetching them. Belongs to one event loop."""

    def __init__(self, duration_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds that never go back."""
        self._duration_s = duration_s
        self._clock = clock
        self._until: dict[BlobKey, float] = {}
        self.admissions = 0
        """Blobs put in, since the start."""

    def __len__(self) -> int:
        """Blobs inside."""
        now = self._clock()
        return sum(until > now for until in list(self._until.values()))

    def add(self, key: BlobKey) -> None:
        """Refuse a blob from now on."""
        now = self._clock()
        self._until = {other: until for other, until in self._until.items() if until > now and other != key}
        self._until[key] = now + self._duration_s
        self.admissions += 1

    def refuse(self, entries: Iterable[BlobEntry]) -> None:
        """Raise BlobCorrupt, which names the blob, when one of these is inside."""
        now = self._clock()
        for entry in entries:
            wait_s = self._until.get(blob_key(entry), now) - now
            if wait_s > 0:
                raise BlobCorrupt(
                    f"blob {entry.digest} came damaged twice and is not fetched for another {wait_s:.0f} s: "
                    "publish the version again with --repair, or check the store and the network"
                )
