"""The small files of a version: tokenizer, chat template, generation defaults. Its own come before the base's."""

from collections.abc import Mapping
from pathlib import Path

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.manifest import FILES
from deltazip_ray.errors import ConfigError


def base_files(base: Path) -> dict[str, bytes]:
    """Files of the base checkpoint, by name; raises ConfigError when there is no tokenizer."""
    if not (base / "tokenizer.json").is_file():
        raise ConfigError(f"{base} has no tokenizer.json: the base's folder must be on this host too")
    return {name: (base / name).read_bytes() for name in FILES if (base / name).is_file()}


def version_files(catalog: Catalog, version: str, of_base: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Files of a version, by name. Raises ArtifactError, StoreError."""
    manifest = catalog.manifest(version)
    files = {name: catalog.file(entry.digest) for name, entry in manifest.files.items()}
    return files if "tokenizer.json" in files else {**of_base, **files}
