"""Writes scores into an artifact's quality record."""

from collections.abc import Iterable

from deltazip_ray.artifact.artifact import MANIFEST, open_artifact
from deltazip_ray.artifact.manifest import Manifest, Quality
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import ConfigError
from deltazip_ray.evaluate.harness import Score


def record_scores(artifact: StoreConfig, measured: str, scores: Iterable[Score]) -> Manifest:
    """Add ``scores`` to the record, and return the new manifest.

    This changes the version's name, which is the digest of its manifest: record before you publish. ``measured`` is the
    version that was scored. Raises ConfigError when the artifact is another version now, ManifestInvalid, StoreError.
    """
    manifest, store = open_artifact(artifact)
    if manifest.version() != measured:
        raise ConfigError(f"{store.url} has changed since it was scored: score it again")
    quality = manifest.quality or Quality(data="none", block_errors={})
    together = quality.scores | {score.name: score.value for score in scores}
    manifest = manifest.model_copy(update={"quality": quality.model_copy(update={"scores": together})})
    store.put(MANIFEST, manifest.canonical())
    return manifest
