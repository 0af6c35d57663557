"""The messages between a node store and its clients."""

from collections.abc import Mapping
from dataclasses import dataclass

from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.residency.tiers import Tier


@dataclass(frozen=True)
class StoredDelta:
    """The place of one held version in the arena."""

    manifest: Manifest
    blobs: Mapping[str, tuple[int, int]]
    """Offset and size in bytes, by block name."""
    tier: Tier


@dataclass(frozen=True)
class NodeReport:
    """The metrics of a node store and its replicas, as Prometheus text."""

    node: str
    store: str
    replicas: Mapping[str, str]
