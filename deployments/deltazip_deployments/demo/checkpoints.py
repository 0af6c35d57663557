"""A cache of trained checkpoints in the user's cache folder. Without torch.

A checkpoint appears there only when it is complete, so a run may be interrupted at any moment.
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
        """The folder of a checkpoint, which need not exist."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether a checkpoint exists."""
        return self.path(name).is_dir()

    def get(self, name: str, make: Callable[[Path], None]) -> Path:
        """The checkpoint's folder. If it does not exist, ``make`` writes the checkpoint to an empty folder first.

        If two programs make the same one at once, both use that of the first to finish.
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
