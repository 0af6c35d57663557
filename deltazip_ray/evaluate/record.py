"""Scores in an artifact's quality record."""

from collections.abc import Iterable

from deltazip_ray.artifact.artifact import MANIFEST, open_artifact
from deltazip_ray.artifact.manifest import Manifest, Quality
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import ConfigError
from deltazip_ray.evaluate.harness import Score


def record_scores(artifact: StoreConfig, measured: str, scores: Iterable[Score]) -> Manifest:
    """Write ``scores`` beside those that the record has, and return the new manifest.

    The version's name follows from its manifest, so it changes: record before you publish. ``measured`` is the version
    that was scored. Raises ConfigError when the artifact holds another by now, ManifestInvalid, StoreError.
    """
    manifest, store = open_artifact(artifact)
    if manifest.version() != measured:
        raise ConfigError(f"{store.url} holds another version than the one that was scored: score it again")
    quality = manifest.quality or Quality(data="none", block_errors={})
    together = quality.scores | {score.name: score.value for score in scores}
    manifest = manifest.model_copy(update={"quality": quality.model_copy(update={"scores": together})})
    store.put(MANIFEST, manifest.canonical())
    return manifest
