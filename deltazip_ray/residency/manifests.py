"""A cache of manifests in memory, before the disk tier and the catalog."""

import asyncio
import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.manifest import Manifest, parse_manifest
from deltazip_ray.artifact.names import check_digest
from deltazip_ray.residency.disk_tier import DiskTier

_KEPT = 1024
"""Manifests in memory, so that a cached version can be served while the store is down."""

_READERS = 16
"""Threads that read from the store, separate from all others as it may hang."""


class Manifests:
    """Concurrent callers for one version share one read. Belongs to one event loop; reads run in threads."""

    def __init__(self, catalog: Catalog, disk: DiskTier | None) -> None:
        self._catalog = catalog
        self._disk = disk
        self._known: dict[str, Manifest] = {}  # least recently used first
        self._reads: dict[str, asyncio.Task[Manifest]] = {}
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="deltazip-manifest")

    @property
    def known(self) -> Mapping[str, Manifest]:
        """The manifests in memory, by version."""
        return self._known

    async def get(self, version: str) -> Manifest:
        """A version's manifest, checked against its name.

        Raises InvalidName, ObjectNotFound, ManifestInvalid, BaseMismatch, StoreUnavailable.
        """
        if version in self._known:
            self._known[version] = self._known.pop(version)
            return self._known[version]
        read = self._reads.get(version)
        if read is None:
            read = self._reads[version] = asyncio.create_task(self._read(version))
            read.add_done_callback(functools.partial(self._done, version))
        return await asyncio.shield(read)

    def forget(self, version: str) -> None:
        """Drop a version's manifest from memory."""
        self._known.pop(version, None)

    async def close(self) -> None:
        """Wait for running reads."""
        await asyncio.gather(*self._reads.values(), return_exceptions=True)
        self._readers.shutdown()

    def _done(self, version: str, read: asyncio.Task[Manifest]) -> None:
        del self._reads[version]
        if not read.cancelled() and read.exception() is None:
            self._known[version] = read.result()
            if len(self._known) > _KEPT:
                del self._known[next(iter(self._known))]

    async def _read(self, version: str) -> Manifest:
        kept = None if self._disk is None else await asyncio.to_thread(self._kept, self._disk, version)
        if kept is not None:
            return kept
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._fetch, version)

    def _kept(self, disk: DiskTier, version: str) -> Manifest | None:
        """Blocking. A version is named by its manifest's digest, so the disk tier keeps manifests like blobs."""
        data = disk.find(check_digest(version))
        manifest = None if data is None else parse_manifest(data, version)
        return None if manifest is None or manifest.base.digest != self._catalog.base_digest else manifest

    def _fetch(self, version: str) -> Manifest:
        """Blocking."""
        manifest = self._catalog.manifest(version)
        data = manifest.canonical()
        if self._disk is not None and sha256_hex(data) == version:
            self._disk.offer((version, len(data)), memoryview(data))
        return manifest
