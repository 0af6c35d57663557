"""The small files of a version: tokenizer, chat template, generation defaults. Its own override the base's."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.manifest import FILES
from deltazip_ray.errors import ConfigError

_T = TypeVar("_T")


def base_files(base: Path) -> dict[str, bytes]:
    """Files of the base checkpoint, by name; raises ConfigError if there is no tokenizer."""
    if not (base / "tokenizer.json").is_file():
        raise ConfigError(f"{base} has no tokenizer.json: the base's folder must be on this host too")
    return {name: (base / name).read_bytes() for name in FILES if (base / name).is_file()}


def version_files(catalog: Catalog, version: str, of_base: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files of a version, by name. Raises ArtifactError, StoreError."""
    manifest = catalog.manifest(version)
    return beside(of_base, {name: catalog.file(entry.digest) for name, entry in manifest.files.items()})


def beside(of_base: Mapping[str, _T], own: Mapping[str, _T]) -> dict[str, _T]:
    """A version's own files, with the base's for missing ones, unless it has a tokenizer of its own."""
    return dict(own) if "tokenizer.json" in own else {**of_base, **own}
