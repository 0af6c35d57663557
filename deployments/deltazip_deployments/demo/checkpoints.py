"""What was trained, kept in the user's cache folder. Knows no torch.

A checkpoint appears there when it is complete and not before, so a run may break off at any moment.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs


def default_cache() -> Path:
    """The user's cache folder for the demo: ``$XDG_CACHE_HOME/deltazip/demo`` on Linux."""
    return platformdirs.user_cache_path("deltazip") / "demo"


class CheckpointCache:
    """Checkpoints by name, under ``root/key``."""

    def __init__(self, root: Path, key: str) -> None:
        self.folder = root / key

    def path(self, name: str) -> Path:
        """Where a checkpoint is once it is there."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether a checkpoint is there, complete."""
        return self.path(name).is_dir()

    def get(self, name: str, make: Callable[[Path], None]) -> Path:
        """The checkpoint's folder. ``make`` writes it to an empty folder when it is not there yet.

        When two programs make the same one at once, the first to finish wins, and both use that.
        """
        path = self.path(name)
        if self.has(name):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=self.folder) as scratch:
            made = Path(scratch) / name
            made.mkdir()
            make(made)
            try:
                made.rename(path)
            except OSError:
                if not self.has(name):
                    raise
        return path
