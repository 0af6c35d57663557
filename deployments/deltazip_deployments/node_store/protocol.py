"""What a node store and its clients tell each other."""

from collections.abc import Mapping
from dataclasses import dataclass

from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.residency.tiers import Tier


@dataclass(frozen=True)
class StoredDelta:
    """Where one held version lies in the arena."""

    manifest: Manifest
    blobs: Mapping[str, tuple[int, int]]
    """Block name to offset and size in bytes."""
    tier: Tier


@dataclass(frozen=True)
class NodeReport:
    """What one node store and its replicas have to tell to a scrape: Prometheus text each."""

    node: str
    store: str
    replicas: Mapping[str, str]
