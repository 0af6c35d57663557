"""Blobs that arrived damaged on every attempt are not fetched again for a while."""

import time
from collections.abc import Callable, Iterable

from deltazip_ray.artifact.manifest import BlobEntry
from deltazip_ray.errors import BlobCorrupt

BlobKey = tuple[str, int]
"""Digest and size: a manifest with a wrong size must not affect one with the right size."""


def blob_key(entry: BlobEntry) -> BlobKey:
    """Identifies a blob."""
    return entry.digest, entry.size


class Quarantine:
    """The time at which each damaged blob may be tried again. Belongs to one event loop."""

    def __init__(self, duration_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds that never go back."""
        self._duration_s = duration_s
        self._clock = clock
        self._until: dict[BlobKey, float] = {}
        self.admissions = 0
        """Blobs added since the start."""

    def __len__(self) -> int:
        """Blobs in quarantine now."""
        now = self._clock()
        return sum(until > now for until in list(self._until.values()))

    def add(self, key: BlobKey) -> None:
        """Refuse a blob from now on."""
        now = self._clock()
        self._until = {other: until for other, until in self._until.items() if until > now and other != key}
        self._until[key] = now + self._duration_s
        self.admissions += 1

    def refuse(self, entries: Iterable[BlobEntry]) -> None:
        """Raise BlobCorrupt when one of these is in quarantine."""
        now = self._clock()
        for entry in entries:
            wait_s = self._until.get(blob_key(entry), now) - now
            if wait_s > 0:
                raise BlobCorrupt(
                    f"blob {entry.digest} arrived damaged twice and is not fetched for another {wait_s:.0f} s: "
                    "publish the version again with --repair, or check the store and the network"
                )
