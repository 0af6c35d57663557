"""Caches the digests of bases, as hashing a checkpoint takes as long as reading all of it.

The key is the folder, the names, sizes, inodes and modification times of its weights, and the keys of ``config.json``
that the digest depends on. An entry is a small file in the user's cache folder; if it cannot be read or written the
checkpoint is hashed.
"""

import hashlib
import json
import logging
import time
import uuid
from pathlib import Path

import platformdirs

from deltazip_ray.artifact.architecture import architecture_of
from deltazip_ray.artifact.checkpoint import Checkpoint, base_digest
from deltazip_ray.artifact.names import is_digest
from deltazip_ray.config import GIB

_SMALL = GIB
"""Checkpoints with fewer bytes are always hashed."""
_SETTLED_NS = 2_000_000_000
"""A file that was modified more recently may change again within the resolution of its modification time."""

logger = logging.getLogger(__name__)


def known_base_digest(checkpoint: Checkpoint, folder: Path | None = None, small: int = _SMALL) -> str:
    """What :func:`base_digest` returns, read from ``folder`` (default: the user's cache) if it is known.

    A checkpoint of fewer than ``small`` bytes is always hashed.
    """
    if checkpoint.nbytes < small:
        return base_digest(checkpoint)
    identity, newest_ns = _identity(checkpoint)
    entry = (folder or platformdirs.user_cache_path("deltazip") / "bases") / identity
    try:
        known = entry.read_text(errors="replace")
    except OSError:
        known = ""
    if is_digest(known):
        return known
    found = base_digest(checkpoint)
    if time.time_ns() - newest_ns > _SETTLED_NS and _identity(checkpoint)[0] == identity:
        _keep(entry, found)
    return found


def _identity(checkpoint: Checkpoint) -> tuple[str, int]:
    """A name for the current state of a checkpoint's files, and their latest modification time in nanoseconds."""
    stats = [(path.name, path.stat()) for path in sorted(checkpoint.path.glob("*.safetensors*"))]
    files = [(name, stat.st_size, stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    what = [str(checkpoint.path.resolve()), files, architecture_of(checkpoint.config)]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return digest, max(max(stat.st_mtime_ns, stat.st_ctime_ns) for _, stat in stats)


def _keep(entry: Path, digest: str) -> None:
    partial = entry.with_name(f".{uuid.uuid4().hex}")
    try:
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_text(digest)
        partial.replace(entry)
    except OSError as error:
        logger.info("cannot cache the digest of the base: %s", error)
