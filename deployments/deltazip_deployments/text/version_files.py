"""The small files of a version: tokenizer, chat template, generation defaults. Its own override the base's."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.manifest import FILES
from deltazip_ray.errors import ConfigError
from deltazip_ray.once import Once

_VERSIONS = 4096
"""Limit of versions whose lists of files are cached."""

Files = frozenset[tuple[str, str]]
"""(name, sha256) of each file."""


class VersionFiles:
    """Tells which versions have equal files, so that what is made of them is made once. Belongs to one event loop."""

    def __init__(self, catalog: Catalog, base_files: Mapping[str, bytes]) -> None:
        """``base_files``: by name."""
        self._catalog = catalog
        self._of_base = {name: sha256_hex(data) for name, data in base_files.items()}
        self._contents = {self._of_base[name]: data for name, data in base_files.items()}
        self._files = Once[str, Files](_VERSIONS)

    async def of(self, version: str | None) -> Files:
        """The files of ``version``; None: the base. Raises ArtifactError, StoreError."""
        if version is None:
            return frozenset(self._of_base.items())
        return await self._files.get(version, partial(self._find, version))

    def read(self, files: Files) -> dict[str, bytes]:
        """Their contents by name; those that the base has too are not fetched. Blocking; raises ArtifactError,
        StoreError."""
        known, fetch = self._contents, self._catalog.file
        return {name: known[one] if one in known else fetch(one) for name, one in files}

    def _find(self, version: str) -> Files:
        entries = self._catalog.manifest(version).files
        own = {name: entry.digest for name, entry in entries.items() if name in FILES}
        # A version with a tokenizer of its own takes nothing of the base's.
        return frozenset((own if "tokenizer.json" in own else {**self._of_base, **own}).items())


def base_files(base: Path) -> dict[str, bytes]:
    """Files of the base checkpoint, by name; raises ConfigError if there is no tokenizer."""
    if not (base / "tokenizer.json").is_file():
        raise ConfigError(f"{base} has no tokenizer.json: the base's folder must be on this host too")
    return {name: (base / name).read_bytes() for name in FILES if (base / name).is_file()}
