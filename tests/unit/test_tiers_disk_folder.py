"""A bounded folder of blobs: least recently used first to go, across restarts, and nothing wrong is kept."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.errors import BlobCorrupt
from deltazip_ray.residency.disk_folder import DiskFolder
from deltazip_ray.residency.quarantine import BlobKey


def key_of(data: bytes) -> BlobKey:
    return sha256_hex(data), len(data)


def file_of(folder: Path, data: bytes) -> Path:
    return folder / f"{sha256_hex(data)}-{len(data)}"


def put(folder: DiskFolder, data: bytes) -> bool:
    return folder.write(key_of(data), [data[:10], data[10:]])


def get(folder: DiskFolder, data: bytes) -> bytes | None:
    buffer = bytearray(len(data))
    return bytes(buffer) if folder.read_into(key_of(data), memoryview(buffer)) else None


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()} - {".lock"}


def blob(fill: str, size: int = 100) -> bytes:
    return fill.encode() * size


def test_what_was_written_is_read(tmp_path: Path) -> None:
    folder = DiskFolder(tmp_path / "deep" / "down", 1000)
    assert get(folder, blob("a")) is None
    assert put(folder, blob("a"))
    assert put(folder, blob("a")), "once more is no harm"
    assert get(folder, blob("a")) == blob("a")
    assert (len(folder), folder.bytes) == (1, 100)


def test_the_least_recently_used_leaves(tmp_path: Path) -> None:
    folder = DiskFolder(tmp_path, 300)
    for fill in "abc":
        put(folder, blob(fill))
    get(folder, blob("a"))
    put(folder, blob("d", 150))
    assert names(tmp_path) == {file_of(tmp_path, data).name for data in (blob("a"), blob("d", 150))}
    assert (folder.bytes, folder.evictions) == (250, 2)
    assert not put(folder, blob("e", 301)), "larger than all the room"
    assert len(folder) == 2


def test_a_later_process_finds_files_and_the_order_of_their_use(tmp_path: Path) -> None:
    first = DiskFolder(tmp_path, 400)
    for index, fill in enumerate("abcd"):
        put(first, blob(fill))
        os.utime(file_of(tmp_path, blob(fill)), (1000 + index, 1000 + index))
    get(first, blob("a"))
    first.close()
    second = DiskFolder(tmp_path, 400)
    put(second, blob("e", 200))
    assert [get(second, blob(fill)) is not None for fill in "abcd"] == [True, False, False, True]
    os.utime(file_of(tmp_path, blob("e", 200)), (2000, 2000))
    second.close()
    third = DiskFolder(tmp_path, 250)
    assert get(third, blob("e", 200)) is None, "the bound is lower now, and a and d were used later"
    assert third.bytes == 200


def test_bytes_of_another_digest_are_not_kept(tmp_path: Path) -> None:
    folder = DiskFolder(tmp_path, 1000)
    assert not folder.write(key_of(blob("a")), [blob("b")])
    assert names(tmp_path) == set()
    assert get(folder, blob("a")) is None


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> object:
        yield b"a" * 50
        raise OSError("no room")

    folder = DiskFolder(tmp_path, 1000)
    with pytest.raises(OSError, match="no room"):
        folder.write(key_of(blob("a")), chunks())  # type: ignore[arg-type]
    assert names(tmp_path) == set()
    assert folder.bytes == 0
    assert put(folder, blob("a"))


def test_files_that_are_cut_short_or_half_written_are_gone_after_a_restart(tmp_path: Path) -> None:
    first = DiskFolder(tmp_path, 1000)
    put(first, blob("a"))
    put(first, blob("b"))
    first.close()
    file_of(tmp_path, blob("a")).write_bytes(b"a" * 99)
    (tmp_path / ".partial").write_bytes(b"half")
    (tmp_path / "somebody-elses.txt").write_text("not ours")
    (tmp_path / file_of(tmp_path, blob("c")).name).mkdir()
    second = DiskFolder(tmp_path, 1000)
    assert get(second, blob("a")) is None
    assert get(second, blob("b")) == blob("b")
    assert len(names(tmp_path)) == 3
    assert "somebody-elses.txt" in names(tmp_path)


def test_a_file_that_changes_its_size_is_corrupt_and_one_that_is_gone_is_missing(tmp_path: Path) -> None:
    folder = DiskFolder(tmp_path, 1000)
    for fill in "abc":
        put(folder, blob(fill))
    file_of(tmp_path, blob("a")).write_bytes(b"a" * 99)
    file_of(tmp_path, blob("b")).write_bytes(b"b" * 101)
    file_of(tmp_path, blob("c")).unlink()
    for fill in "ab":
        with pytest.raises(BlobCorrupt):
            get(folder, blob(fill))
        folder.remove(key_of(blob(fill)))
        folder.remove(key_of(blob(fill)))
    assert get(folder, blob("c")) is None
    assert (names(tmp_path), folder.bytes, len(folder)) == (set(), 0, 0)


def test_a_folder_that_somebody_removes_is_made_again(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    folder = DiskFolder(root, 1000)
    put(folder, blob("a"))
    shutil.rmtree(root)
    assert get(folder, blob("a")) is None
    assert put(folder, blob("b"))
    assert names(root) == {file_of(root, blob("b")).name}
    assert (folder.bytes, len(folder)) == (100, 1)
    with pytest.raises(BlockingIOError):
        get(DiskFolder(root, 1000), blob("b"))


def test_a_folder_belongs_to_one_process_until_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from deltazip_ray.residency.disk_folder import DiskFolder\n"
        "from hashlib import sha256\n"
        "folder = DiskFolder(Path(sys.argv[1]), 1000)\n"
        "folder.write((sha256(b'a' * 100).hexdigest(), 100), [b'a' * 100])\n"
        "(Path(sys.argv[1]) / '.partial').write_bytes(b'half')\n"
        "print('written', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    folder = DiskFolder(tmp_path, 1000)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "written\n"
        with pytest.raises(BlockingIOError, match="another process uses the folder"):
            get(folder, blob("a"))
        with pytest.raises(BlockingIOError):
            put(folder, blob("b"))
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert get(folder, blob("a")) == blob("a")
    assert names(tmp_path) == {file_of(tmp_path, blob("a")).name}


class Model:
    """A folder, and what should be in it: least recently used first. Each method is one thing that may happen."""

    def __init__(self, rng: random.Random, path: Path) -> None:
        self.rng = rng
        self.path = path
        self.limit = rng.randint(200, 700)
        self.pool = [bytes([index]) * rng.randint(1, 300) for index in range(12)]
        self.folder = DiskFolder(path, self.limit)
        self.inside: list[bytes] = []
        self.step = 0

    def write(self) -> None:
        data = self.rng.choice(self.pool)
        if data in self.inside:
            return
        assert put(self.folder, data) == (len(data) <= self.limit)
        if len(data) <= self.limit:
            while sum(map(len, self.inside)) > self.limit - len(data):
                self.inside.pop(0)
            self.use(data)

    def read(self) -> None:
        data = self.rng.choice(self.pool)
        assert get(self.folder, data) == (data if data in self.inside else None)
        if data in self.inside:
            self.inside.remove(data)
            self.use(data)

    def restart(self) -> None:
        self.folder.close()
        self.folder = DiskFolder(self.path, self.limit)
        assert get(self.folder, b"unknown") is None

    def damage(self) -> None:
        """A file is cut short; that is found out when it is read, or after a restart."""
        if self.inside:
            data = self.inside.pop(self.rng.randrange(len(self.inside)))
            file_of(self.path, data).write_bytes(data[:-1])
            if self.rng.random() < 0.5:
                self.restart()
                return
            with pytest.raises(BlobCorrupt):
                get(self.folder, data)
            self.folder.remove(key_of(data))

    def vanish(self) -> None:
        if self.inside:
            data = self.inside.pop(self.rng.randrange(len(self.inside)))
            file_of(self.path, data).unlink()
            assert get(self.folder, data) is None

    def use(self, data: bytes) -> None:
        self.inside.append(data)
        self.step += 1
        os.utime(file_of(self.path, data), (self.step, self.step))

    def check(self) -> None:
        assert list(self.folder._files) == [key_of(data) for data in self.inside]
        assert names(self.path) == {file_of(self.path, data).name for data in self.inside}
        assert self.folder.bytes == sum(map(len, self.inside)) <= self.limit


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_keeps_to_the_bound_and_serves_only_what_was_written(seed: int, tmp_path: Path) -> None:
    model = Model(random.Random(seed), tmp_path)
    get(model.folder, b"unknown")  # makes and claims the folder
    happenings = [model.write, model.write, model.read, model.read, model.restart, model.damage, model.vanish]
    for _ in range(250):
        model.rng.choice(happenings)()
        model.check()
