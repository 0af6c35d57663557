"""The tiers, and the interface that brings versions to the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from deltazip_ray.artifact.manifest import Manifest

Tier = Literal["device", "host", "disk", "remote"]
PrefetchTier = Literal["device", "host"]


@dataclass(frozen=True, eq=False)
class HostMemory:
    """The memory that blobs lie in. It stays mapped while this object lives, so that a device can register it once."""

    view: memoryview


@dataclass(frozen=True)
class HostDelta:
    """One version in host memory, verified against its manifest's digests.

    The views stay valid until the version is released.
    """

    manifest: Manifest
    blobs: Mapping[str, memoryview]
    """The bytes of each block's safetensors blob, by block name (``layers.0``, ``outer``)."""
    tier: Tier
    """The tier that the slowest blob came from."""
    memory: HostMemory | None = None
    """The memory of all blobs, if it is in one piece."""


class DeltaSource(Protocol):
    """Brings versions into host memory: the node store, or a cache in the same process (in tests)."""

    async def acquire(self, version: str) -> HostDelta:
        """Bring a version to the host and hold it there until :meth:`release`.

        Concurrent calls for one version share one fetch. Raises ArtifactError, StoreError.
        """
        ...

    async def release(self, version: str) -> None:
        """Undo one :meth:`acquire`; the bytes may stay cached."""
        ...

    async def prefetch(self, version: str) -> bool:
        """Bring a version to the host that will be needed soon, with lower priority than all that is needed now.

        Returns whether it is there; False also when the hint was dropped, for any reason.
        """
        ...

    async def discard(self, version: str, *, disk: bool = False) -> None:
        """Free the memory of a version that no other one shares, now or at the last release.

        ``disk``: remove it from the host's disk too.
        """
        ...

    def seconds_away(self, version: str) -> float:
        """The expected time of an :meth:`acquire`; 0.0 when the version is on the host. Cheap."""
        ...
