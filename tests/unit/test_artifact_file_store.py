import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import ConfigError, StoreFull, StoreUnavailable

WRITER = """
import sys
from pathlib import Path
from deltazip_ray.artifact.file_store import FileStore

store = FileStore(Path(sys.argv[1]))
print("go", flush=True)
while True:
    store.put("k", b"x" * (64 << 20))
"""


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let the kernel refuse files beyond ``size`` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("url", ["file://host/path", "file://relative", "file:///a?b=c", "file:///a#b"])
def test_urls_that_are_no_folder(url: str) -> None:
    with pytest.raises(ConfigError, match="file:///absolute/path"):
        open_store(StoreConfig(url=url))


def test_escapes_in_urls(tmp_path: Path) -> None:
    store = open_store(StoreConfig(url=f"file://{tmp_path}/with%20space"))
    store.put("k", b"")
    assert (tmp_path / "with space" / "k").is_file()
    assert store.url == f"file://{tmp_path}/with%20space"


def test_opening_and_reading_write_nothing(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    with pytest.raises(StoreUnavailable):
        store.list()
    assert not store.exists("k")
    assert not (tmp_path / "store").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.put("k", b"old")
    with room_for(50_000), pytest.raises(StoreFull, match="free space"):
        store.put("k", bytes(100_000))
    assert store.get("k") == b"old"
    assert files(tmp_path / "store") == [tmp_path / "store" / "k"]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="check the disk"):
        FileStore(tmp_path / "file" / "store").put("k", b"")


def test_readers_see_whole_objects_while_others_write(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    values = {bytes([i]) * 300_000 for i in range(4)}
    store.put("k", next(iter(values)))
    done = threading.Event()

    def write(value: bytes) -> None:
        while not done.is_set():
            store.put("k", value)

    writers = [threading.Thread(target=write, args=(value,)) for value in values]
    for writer in writers:
        writer.start()
    try:
        seen = {store.get("k") for _ in range(300)}
        buffer = bytearray(300_000)
        for _ in range(300):
            store.read_into("k", memoryview(buffer))
            assert bytes(buffer) in values
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert seen <= values


def test_a_writer_that_is_killed_leaves_nothing_visible(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 20
        while not any(tmp_path.glob(".partial/*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
    store = FileStore(tmp_path)
    assert store.list() in ([], ["k"])
    assert not store.exists("k") or store.size("k") == 64 << 20


def test_a_folder_that_vanished_is_not_an_empty_store(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.put("a/b", b"1")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    for read in (lambda: store.list("a/"), store.folders, lambda: store.get("a/b"), lambda: store.size("a/b")):
        with pytest.raises(StoreUnavailable, match="no folder"):
            read()
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    assert store.get("a/b") == b"1"
