"""What every store promises, over a folder and over a real S3 server."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deltazip_ray.artifact.object_store import PART
from deltazip_ray.artifact.store import ObjectStore, open_store
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import (
    BlobCorrupt,
    DeltaZipError,
    InvalidName,
    ObjectNotFound,
    StoreError,
)


@pytest.fixture(params=["file", "s3"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> StoreConfig:
    if request.param == "file":
        return StoreConfig(url=(tmp_path / "a store with spaces").as_uri())
    server = request.getfixturevalue("s3_environment")
    return StoreConfig(url=f"s3://{server.new_bucket()}/some/prefix", endpoint_url=server.endpoint, path_style=True)


@pytest.fixture
def store(config: StoreConfig) -> ObjectStore:
    return open_store(config)


def test_what_was_put_is_got(store: ObjectStore) -> None:
    store.put("a/b.json", b"one")
    store.put("a/b.json", b"two")
    assert store.get("a/b.json") == b"two"
    assert store.size("a/b.json") == 3
    assert store.exists("a/b.json")


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    store.put("empty", b"")
    assert store.get("empty") == b""
    store.read_into("empty", memoryview(bytearray()))
    store.put("full", b"x")
    with pytest.raises(BlobCorrupt):
        store.read_into("full", memoryview(bytearray()))
    with pytest.raises(BlobCorrupt):
        store.read_into("empty", memoryview(bytearray(3)))


def test_another_handle_sees_what_was_written(config: StoreConfig) -> None:
    open_store(config).put("k", b"v")
    assert open_store(config).get("k") == b"v"


def test_absent_objects(store: ObjectStore) -> None:
    store.put("a/b", b"")
    for key in ("nothing", "a", "a/b/c"):
        with pytest.raises(ObjectNotFound, match=key):
            store.get(key)
        with pytest.raises(ObjectNotFound):
            store.size(key)
        with pytest.raises(ObjectNotFound):
            store.read_into(key, memoryview(bytearray(3)))
        assert not store.exists(key)
        store.delete(key)
    assert store.get("a/b") == b""


def test_delete(store: ObjectStore) -> None:
    store.put("k", b"v")
    store.delete("k")
    assert not store.exists("k")
    assert store.list() == []


def test_get_reads_no_more_than_asked(store: ObjectStore) -> None:
    store.put("k", b"12345")
    assert store.get("k", 5) == b"12345"
    with pytest.raises(StoreError, match="larger than 4"):
        store.get("k", 4)


@pytest.mark.parametrize("size", [1, PART - 1, PART, PART + 1, 3 * PART + 12345])
def test_read_into_fills_the_buffer(store: ObjectStore, size: int) -> None:
    data = os.urandom(size)
    store.put("big", data)
    arena = bytearray(size + 20)
    store.read_into("big", memoryview(arena)[10 : 10 + size])
    assert arena[10 : 10 + size] == data
    assert arena[:10] == arena[-10:] == bytes(10)


@pytest.mark.parametrize(("stored", "asked"), [(10, 9), (10, 11), (2 * PART, PART), (PART, 2 * PART), (1, 3 * PART)])
def test_read_into_refuses_another_size(store: ObjectStore, stored: int, asked: int) -> None:
    store.put("k", bytes(stored))
    with pytest.raises(BlobCorrupt):
        store.read_into("k", memoryview(bytearray(asked)))


def test_a_large_object(store: ObjectStore) -> None:
    data = os.urandom(40 << 20)  # more than one part of a managed upload
    store.put("blobs/big", data)
    buffer = bytearray(len(data))
    store.read_into("blobs/big", memoryview(buffer))
    assert buffer == data


def test_list_and_folders(store: ObjectStore) -> None:
    keys = ["a/b/1", "a/b/2", "a/bc", "d", "a/z/y"]
    for key in keys:
        store.put(key, b"")
    assert store.list() == sorted(keys)
    assert store.list("a/b") == ["a/b/1", "a/b/2", "a/bc"]
    assert store.list("a/b/") == ["a/b/1", "a/b/2"]
    assert store.list("nothing/") == []
    assert store.folders() == ["a"]


def test_list_is_complete_beyond_a_page(store: ObjectStore) -> None:
    keys = [f"many/{i:04d}" for i in range(150)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert store.list("many/") == keys


HOSTILE_KEYS = (
    *("", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".", ".hidden", "a/.partial"),
    *("a b", "a\\b", "a\0", "ü", "a\n", "x" * 901),
)


def test_hostile_keys_are_refused(store: ObjectStore, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    attacks = (
        store.get,
        store.size,
        store.exists,
        store.delete,
        lambda key: store.put(key, b"x"),
        lambda key: store.read_into(key, memoryview(bytearray(1))),
    )
    for key, attack in itertools.product(HOSTILE_KEYS, attacks):
        with pytest.raises(InvalidName):
            attack(key)
    assert sorted(tmp_path.rglob("*")) == before


def test_hostile_prefixes_are_refused(store: ObjectStore) -> None:
    for prefix in ("../", "/", "a/../", "a//"):
        with pytest.raises(InvalidName):
            store.list(prefix)


def test_parallel_use_of_one_handle(store: ObjectStore) -> None:
    data = {f"k{i}": os.urandom(PART + 1000 * i) for i in range(6)}

    def round_trip(key: str) -> bool:
        store.put(key, data[key])
        buffer = bytearray(len(data[key]))
        store.read_into(key, memoryview(buffer))
        return buffer == data[key]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(round_trip, data))


def test_errors_name_the_place(store: ObjectStore) -> None:
    with pytest.raises(DeltaZipError) as caught:
        store.get("no/such")
    assert store.url in caught.value.message
