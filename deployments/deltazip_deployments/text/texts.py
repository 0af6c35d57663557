"""A cache of the tokenizers and templates of the base and of versions."""

from deltazip_deployments.text.version_files import Files, VersionFiles
from deltazip_deployments.text.version_text import VersionText, load_version_text
from deltazip_ray.once import Once

_LOADED = 64


class Texts:
    """Tokenizers are slow to load and large, so versions with equal files, and the base, share one.

    Belongs to one event loop; reads and loads run in threads.
    """

    def __init__(self, files: VersionFiles) -> None:
        self._files = files
        self._loaded = Once[Files, VersionText](_LOADED)

    async def get(self, version: str | None) -> VersionText:
        """The text of ``version``; None: the base. Raises ArtifactError, StoreError."""
        files = await self._files.of(version)
        return await self._loaded.get(files, lambda: load_version_text(self._files.read(files)))
