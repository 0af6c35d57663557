"""The digest of a base, remembered: hashing a checkpoint takes as long as reading all of it.

An entry holds for a folder and for files of these names, sizes, inodes and times of change in it, and for what of
``config.json`` the digest depends on. It is a small file in the user's cache folder; one that cannot be read or written
costs no more than the hashing.
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
"""Bytes of a checkpoint that is hashed sooner than it is looked up safely."""
_SETTLED_NS = 2_000_000_000
"""A file that changed more recently may change once more without its time of change showing it."""

logger = logging.getLogger(__name__)


def known_base_digest(checkpoint: Checkpoint, folder: Path | None = None, small: int = _SMALL) -> str:
    """What :func:`base_digest` returns, from ``folder`` (absent: the user's cache) where it is known.

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
    """A name for a checkpoint's files as they are now, and the latest time of change, in nanoseconds."""
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
        logger.info("the digest of a base is not remembered: %s", error)
