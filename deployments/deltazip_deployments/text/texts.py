"""A cache of the tokenizers and templates of the base and of versions."""

from collections import OrderedDict

from deltazip_deployments.text.own_thread import OwnThread
from deltazip_deployments.text.version_files import Files, VersionFiles
from deltazip_deployments.text.version_text import VersionText, load_version_text
from deltazip_ray.once import Once

_LOADED = 64
_THREADS = 256


class Texts:
    """Tokenizers are slow to load and large, so versions with equal files, and the base, share one.

    Belongs to one event loop; reads and loads run in threads.
    """

    def __init__(self, files: VersionFiles) -> None:
        self._files = files
        self._loaded = Once[Files, VersionText](_LOADED)
        self._threads: OrderedDict[str | None, OwnThread] = OrderedDict()

    async def get(self, version: str | None) -> VersionText:
        """The text of ``version``; None: the base. Raises ArtifactError, StoreError."""
        files = await self._files.of(version)
        return await self._loaded.get(files, lambda: load_version_text(self._files.read(files)))

    def thread(self, version: str | None) -> OwnThread:
        """Where prompts of ``version`` are to be encoded: long ones of one version do not delay another's."""
        if version not in self._threads:
            self._threads[version] = OwnThread()
        self._threads.move_to_end(version)
        if len(self._threads) > _THREADS:
            self._threads.popitem(last=False)
        return self._threads[version]
