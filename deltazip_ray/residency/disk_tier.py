"""The disk tier: what was fetched survives a restart of the host's store.

* **Nothing is believed.** A file's bytes are verified whenever they are read; one that is damaged is removed, and its
  blob is fetched again.
* **Never in the way.** Blobs are written by a thread of their own after they were published, from the arena, whose
  room they do not hold: bytes that are overwritten meanwhile have not the blob's digest any more, and are not kept.
* **Never a failed request.** What goes wrong with the disk is counted and costs the caching; a log line says when it
  begins. Writing pauses after a failure.
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
"""Without writing, after a failure."""
_QUIET_S = 600.0
"""Without a failure, until one is worth a line in the log again: on a full disk every now and then a write succeeds."""
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
        self._failed_at: float | None = None

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

    def has(self, key: BlobKey) -> bool:
        """Whether a blob was kept here when somebody last looked. Cheap."""
        return key in self._folder

    def discard(self, keys: Iterable[BlobKey]) -> None:
        """Remove blobs; it is no error if there are none. Blocking."""
        for key in keys:
            self._remove(key)

    def find(self, digest: str) -> bytes | None:
        """A small blob of unknown size, verified; None when it cannot be had from here. Blocking."""
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
        """Fill ``buffer``, of the blob's size, with a blob and verify it; False when it cannot be had from here.

        ``buffer`` is undefined then. Blocking.
        """
        try:
            found = hashlib.sha256()
            if not self._folder.read_into(key, buffer, found.update):
                return False
            if found.hexdigest() != key[0]:
                raise BlobCorrupt(f"{key[0]} has another digest than its name")
        except BlobCorrupt as error:
            self._metrics.damaged.inc()
            logger.warning("the disk tier had a damaged blob, which is fetched again: %s", error)
        except OSError as error:
            self._failed("read", error)
        else:
            return True
        self._remove(key)
        return False

    def offer(self, key: BlobKey, buffer: memoryview) -> None:
        """Keep a blob whose verified bytes are in ``buffer`` now; returns at once.

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
        """Finish the write under way, leave the others, and let another process have the folder. Blocking."""
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
                "the disk tier in %s fails to %s (%s); what it does not keep is fetched from the store again: "
                "give it room, or set node_store.disk_dir to another folder",
                self._folder.root,
                operation,
                error.strerror,
            )


def _chunks(buffer: memoryview) -> Iterator[bytes]:
    """Copies, so that what is hashed is what is written."""
    for start in range(0, len(buffer), MIB):
        yield bytes(buffer[start : start + MIB])
