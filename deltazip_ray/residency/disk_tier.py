"""The disk tier: what was fetched survives a restart of the host's store.

* **Nothing is believed.** A file's bytes are verified whenever they are read; one that is damaged is removed, and its
  blob is fetched again.
* **Never in the way.** Blobs are written by a thread of their own after they were published, from the arena, whose
  room they do not hold: bytes that are overwritten meanwhile have not the blob's digest any more, and are not kept.
* **Never a failed request.** What goes wrong with the disk is counted and costs the caching; a log line says when it
  begins, another one when it is over. Writing pauses after a failure.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.digests import verify_blob
from deltazip_ray.artifact.manifest import BlobEntry
from deltazip_ray.config import MIB, NodeStoreConfig
from deltazip_ray.errors import BlobCorrupt
from deltazip_ray.observability.disk_metrics import DiskMetrics, DiskStats
from deltazip_ray.residency.disk_folder import DiskFolder
from deltazip_ray.residency.quarantine import blob_key

_PAUSE_S = 30.0
"""Without writing, after a failure."""
_BACKLOG = 64
"""Blobs that may wait to be written; their room is likely to be overwritten when there are more."""

logger = logging.getLogger(__name__)


class DiskTier:
    """Verified blobs in a folder. Thread-safe; nothing raises for the disk's sake."""

    def __init__(self, folder: DiskFolder, metrics: DiskMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds that never go back."""
        self._folder = folder
        self._metrics = metrics
        self._clock = clock
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="deltazip-disk")
        self._lock = threading.Lock()
        self._backlog = 0
        self._paused_until: float | None = None

    @classmethod
    def from_settings(
        cls, settings: NodeStoreConfig, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> "DiskTier | None":
        """The tier that the settings ask for, if any."""
        if settings.disk_dir is None:
            return None
        folder = DiskFolder(settings.disk_dir, settings.disk_bytes)
        metrics = DiskMetrics(registry, lambda: DiskStats(folder.bytes, len(folder), folder.evictions))
        return cls(folder, metrics, clock)

    def read(self, entry: BlobEntry, buffer: memoryview) -> bool:
        """Fill ``buffer``, of ``entry.size`` bytes, with a blob and verify it; False when it cannot be had from here.

        ``buffer`` is undefined then. Blocking.
        """
        key = blob_key(entry)
        try:
            if not self._folder.read_into(key, buffer):
                return False
            verify_blob(buffer, entry)
        except BlobCorrupt as error:
            self._metrics.damaged.inc()
            logger.warning("the disk tier had a damaged blob, which is fetched again: %s", error)
        except OSError as error:
            self._failed("read", error)
        else:
            return True
        self._remove(entry)
        return False

    def offer(self, entry: BlobEntry, buffer: memoryview) -> None:
        """Keep a blob whose verified bytes are in ``buffer`` now; returns at once.

        ``buffer`` may be overwritten at any time, but must stay mapped until :meth:`close`.
        """
        with self._lock:
            paused = self._paused_until is not None and self._clock() < self._paused_until
            if paused or self._backlog >= _BACKLOG:
                self._metrics.skipped.inc()
                return
            self._backlog += 1
        self._writer.submit(self._write, entry, buffer)

    def close(self) -> None:
        """Finish the write under way, leave the others, and let another process have the folder. Blocking."""
        self._writer.shutdown(cancel_futures=True)
        self._folder.close()

    def _write(self, entry: BlobEntry, buffer: memoryview) -> None:
        try:
            kept = self._folder.write(blob_key(entry), _chunks(buffer))
        except OSError as error:
            self._failed("write", error)
        else:
            self._recovered()
            if not kept:
                self._metrics.skipped.inc()
        finally:
            with self._lock:
                self._backlog -= 1

    def _remove(self, entry: BlobEntry) -> None:
        try:
            self._folder.remove(blob_key(entry))
        except OSError as error:
            self._failed("remove", error)

    def _failed(self, operation: str, error: OSError) -> None:
        self._metrics.failures.labels(operation).inc()
        with self._lock:
            news = self._paused_until is None
            self._paused_until = self._clock() + _PAUSE_S
        if news:
            logger.warning(
                "the disk tier in %s fails to %s (%s) and keeps nothing new for now: give it room, or set "
                "node_store.disk_dir to another folder",
                self._folder.root,
                operation,
                error.strerror,
            )

    def _recovered(self) -> None:
        with self._lock:
            news, self._paused_until = self._paused_until is not None, None
        if news:
            logger.info("the disk tier in %s works again", self._folder.root)


def _chunks(buffer: memoryview) -> Iterator[bytes]:
    """Copies, so that what is hashed is what is written."""
    for start in range(0, len(buffer), MIB):
        yield bytes(buffer[start : start + MIB])
