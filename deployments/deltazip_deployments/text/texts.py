"""A cache of the tokenizers and templates of the base and of versions."""

from collections.abc import Mapping
from functools import partial

from deltazip_deployments.text.version_files import beside
from deltazip_deployments.text.version_text import VersionText, load_version_text
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.manifest import FILES
from deltazip_ray.once import Once

_VERSIONS = 4096
"""Limit of versions whose lists of files are cached."""
_LOADED = 64

_Files = frozenset[tuple[str, str]]
"""(name, sha256) of each file."""


class Texts:
    """Tokenizers are slow to load and large, so versions with equal files, and the base, share one.

    Belongs to one event loop; reads and loads run in threads.
    """

    def __init__(self, catalog: Catalog, base_files: Mapping[str, bytes]) -> None:
        """``base_files``: by name."""
        self._catalog = catalog
        self._of_base = {name: sha256_hex(data) for name, data in base_files.items()}
        self._contents = {self._of_base[name]: data for name, data in base_files.items()}
        self._files = Once[str, _Files](_VERSIONS)
        self._loaded = Once[_Files, VersionText](_LOADED)

    async def get(self, version: str | None) -> VersionText:
        """The text of ``version``; None: the base. Raises ArtifactError, StoreError."""
        files = frozenset(self._of_base.items())
        if version is not None:
            files = await self._files.get(version, partial(self._find, version))
        return await self._loaded.get(files, partial(self._load, files))

    def _find(self, version: str) -> _Files:
        entries = self._catalog.manifest(version).files
        own = {name: entry.digest for name, entry in entries.items() if name in FILES}
        return frozenset(beside(self._of_base, own).items())

    def _load(self, files: _Files) -> VersionText:
        """Load; files that the base has too are not fetched."""
        known, fetch = self._contents, self._catalog.file
        return load_version_text({name: known[one] if one in known else fetch(one) for name, one in files})
