"""Where a version's bytes are, and who brings them to the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from deltazip_ray.artifact.manifest import Manifest

Tier = Literal["device", "host", "disk", "remote"]
PrefetchTier = Literal["device", "host"]


@dataclass(frozen=True, eq=False)
class HostMemory:
    """Memory that blobs lie in, mapped at least as long as this object lives: a device may register it once."""

    view: memoryview


@dataclass(frozen=True)
class HostDelta:
    """One version in host memory, verified against its manifest's digests.

    The views stay valid until the version is released.
    """

    manifest: Manifest
    blobs: Mapping[str, memoryview]
    """Block name (``layers.0``, ``outer``) to the bytes of its safetensors blob."""
    tier: Tier
    """Where the slowest blob was found."""
    memory: HostMemory | None = None
    """What all blobs lie in, where they lie in one piece."""


class DeltaSource(Protocol):
    """Brings versions into host memory: the node store, or in tests a cache in the same process."""

    async def acquire(self, version: str) -> HostDelta:
        """Bring a version to the host and hold it there until :meth:`release`.

        Concurrent calls for one version make one fetch. Raises ArtifactError, StoreError.
        """
        ...

    async def release(self, version: str) -> None:
        """Let go of one :meth:`acquire`; the bytes may stay cached."""
        ...

    async def prefetch(self, version: str) -> bool:
        """Bring a version to the host because somebody will want it soon, behind all that is wanted now.

        Returns whether it is there; False also when the hint was dropped, for any reason.
        """
        ...

    async def discard(self, version: str, *, disk: bool = False) -> None:
        """Free what a version takes and no other one needs: at once, or when the last one has released it.

        ``disk``: on the host's disk too.
        """
        ...

    def seconds_away(self, version: str) -> float:
        """What an :meth:`acquire` would take now, by experience; 0.0 when the version is on the host. Cheap."""
        ...
