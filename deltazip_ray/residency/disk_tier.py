"""The disk tier: fetched blobs survive a restart of the node store.

* **Every read is verified.** A damaged file is removed, and its blob is fetched again.
* **Writes delay nobody.** A separate thread writes blobs from the arena after they became available to requests. It
  does not hold their room: a blob that is overwritten meanwhile no longer has its digest, and is not kept.
* **A broken disk fails no request.** It only costs the caching: errors are counted, the first one is logged, and
  writing pauses after each.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry

from deltazip_ray.config import MIB, NodeStoreConfig
from deltazip_ray.errors import BlobCorrupt
from deltazip_ray.observability.disk_metrics import DiskMetrics, DiskStats
from deltazip_ray.residency.disk_folder import DiskFolder
from deltazip_ray.residency.quarantine import BlobKey

_PAUSE_S = 30.0
"""Pause in writing after a failure."""
_QUIET_S = 600.0
"""A failure is logged again after this time without one: on a full disk a write succeeds now and then."""
_BACKLOG = 64
"""Limit of blobs waiting to be written; with more, their room would probably be overwritten before."""

logger = logging.getLogger(__name__)


class DiskTier:
    """Verified blobs in a folder. Thread-safe; errors of the disk are never raised."""

    def __init__(self, folder: DiskFolder, metrics: DiskMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds that never go back."""
        self._folder = folder
        self._metrics = metrics
        self._clock = clock
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="deltazip-disk")
        self._lock = threading.Lock()
        self._backlog = 0
        self._failed_at: float | None = None

    @classmethod
    def from_settings(
        cls, settings: NodeStoreConfig, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> "DiskTier | None":
        """The configured tier, if any."""
        if settings.disk_dir is None:
            return None
        folder = DiskFolder(settings.disk_dir, settings.disk_bytes)
        metrics = DiskMetrics(registry, lambda: DiskStats(folder.bytes, len(folder), folder.evictions))
        return cls(folder, metrics, clock)

    def has(self, key: BlobKey) -> bool:
        """Whether the blob is probably here. Cheap: does not touch the disk."""
        return key in self._folder

    def discard(self, keys: Iterable[BlobKey]) -> None:
        """Remove blobs if they exist. Blocking."""
        for key in keys:
            self._remove(key)

    def find(self, digest: str) -> bytes | None:
        """A small blob of unknown size, verified; None when it cannot be read from here. Blocking."""
        try:
            key = self._folder.find(digest)
        except OSError as error:
            self._failed("read", error)
            return None
        if key is None:
            return None
        buffer = bytearray(key[1])
        return bytes(buffer) if self.read(key, memoryview(buffer)) else None

    def read(self, key: BlobKey, buffer: memoryview) -> bool:
        """Fill ``buffer``, of the blob's size, with a blob and verify it; False when it cannot be read from here.

        The content of ``buffer`` is undefined then. Blocking.
        """
        try:
            found = hashlib.sha256()
            if not self._folder.read_into(key, buffer, found.update):
                return False
            if found.hexdigest() != key[0]:
                raise BlobCorrupt(f"the bytes of {key[0]} do not match its digest")
        except BlobCorrupt as error:
            self._metrics.damaged.inc()
            logger.warning("a blob on disk is damaged and will be fetched again: %s", error)
        except OSError as error:
            self._failed("read", error)
        else:
            return True
        self._remove(key)
        return False

    def offer(self, key: BlobKey, buffer: memoryview) -> None:
        """Write a blob whose verified bytes are in ``buffer`` later, in another thread.

        ``buffer`` may be overwritten at any time, but must stay mapped until :meth:`close`.
        """
        with self._lock:
            paused = self._failed_at is not None and self._clock() < self._failed_at + _PAUSE_S
            if paused or self._backlog >= _BACKLOG:
                self._metrics.skipped.inc()
                return
            self._backlog += 1
        self._writer.submit(self._write, key, buffer)

    def close(self) -> None:
        """Finish the current write, drop the others, and release the folder to other processes. Blocking."""
        self._writer.shutdown(cancel_futures=True)
        self._folder.close()

    def _write(self, key: BlobKey, buffer: memoryview) -> None:
        try:
            kept = self._folder.write(key, _chunks(buffer))
        except OSError as error:
            self._failed("write", error)
        else:
            if not kept:
                self._metrics.skipped.inc()
        finally:
            with self._lock:
                self._backlog -= 1

    def _remove(self, key: BlobKey) -> None:
        try:
            self._folder.remove(key)
        except OSError as error:
            self._failed("remove", error)

    def _failed(self, operation: str, error: OSError) -> None:
        self._metrics.failures.labels(operation).inc()
        now = self._clock()
        with self._lock:
            news = self._failed_at is None or now - self._failed_at > _QUIET_S
            self._failed_at = now
        if news:
            logger.warning(
                "the disk tier in %s failed to %s (%s); blobs that it does not keep are fetched from the store again: "
                "free space, or set node_store.disk_dir to another folder",
                self._folder.root,
                operation,
                error.strerror,
            )


def _chunks(buffer: memoryview) -> Iterator[bytes]:
    """Copies, so that the hashed bytes are the written ones."""
    for start in range(0, len(buffer), MIB):
        yield bytes(buffer[start : start + MIB])
