"""Finds and ends all processes that were started on our behalf, directly or indirectly.

Ray's processes watch their parents, but not from their first moment: one whose parent is killed right then stays alive.
So everything that is started inside :func:`marked` has our process id in its environment, where it can be found.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_VARIABLE = "DELTAZIP_STARTED_BY"
_PAUSE_S = 0.05


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Mark all processes that are started in the block, directly or indirectly, for :func:`end_marked`."""
    os.environ[_VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_VARIABLE]


def end_marked(grace_s: float = 3.0) -> None:
    """Wait until the marked processes have ended, and kill those that have not after ``grace_s``."""
    deadline = time.monotonic() + grace_s
    while alive := _find():
        if time.monotonic() > deadline:
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(_PAUSE_S)


def _find() -> list[int]:
    mark = f"{_VARIABLE}={os.getpid()}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # Processes of other users cannot be read, and ours may end meanwhile.
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found
