"""Publishing, naming and finding versions, over a folder and over a real S3 server."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from deltazip_ray.artifact.artifact import ArtifactWriter, open_artifact, verify_artifact
from deltazip_ray.artifact.catalog import Catalog, bases
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.artifact.lossless import read_verified
from deltazip_ray.artifact.manifest import BaseRef, Manifest, TensorEntry, blob_key
from deltazip_ray.artifact.names import parse_ref
from deltazip_ray.artifact.store import ObjectStore, open_store
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import (
    BaseMismatch,
    BlobCorrupt,
    InvalidName,
    ManifestInvalid,
    ObjectNotFound,
    StoreUnavailable,
    UnknownVariant,
)
from tests.support.s3 import S3Server

BASE = "b" * 64
NORM = "model.norm.weight"


def make_artifact(folder: Path, value: float = 1.0, *, base: str = BASE, shared: float = 0.0) -> Manifest:
    """An artifact of one decoder block (``shared``), an outer block (``value``) and a file."""
    writer = ArtifactWriter(FileStore(folder))
    for block, name, content in (("layers.0", "model.layers.0.input_layernorm.weight", shared), ("outer", NORM, value)):
        entry = TensorEntry(codec="raw", shape=(1000,), bytes_finetuned=4000)
        writer.add_blob(block, {name: torch.full((1000,), content)}, {name: entry})
    writer.add_file("tokenizer.json", b'{"model": 1}')
    reference = BaseRef(digest=base, architecture="LlamaForCausalLM", vocab_size=10)
    return writer.finish(layout_version=1, base=reference, bytes_finetuned=8000)


@pytest.fixture(params=["file", "s3"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> StoreConfig:
    if request.param == "file":
        return StoreConfig(url=(tmp_path / "store").as_uri())
    server = request.getfixturevalue("s3_environment")
    return StoreConfig(url=f"s3://{server.new_bucket()}/store", endpoint_url=server.endpoint, path_style=True)


@pytest.fixture
def store(config: StoreConfig) -> ObjectStore:
    store = open_store(config)
    store.create()
    return store


@pytest.fixture
def catalog(store: ObjectStore) -> Catalog:
    return Catalog(store, BASE)


@pytest.fixture
def publish(tmp_path: Path, catalog: Catalog) -> Callable[..., str]:
    """Publish a version that differs by ``value``; returns its digest."""

    def run(value: float, name: str = "sorter", *aliases: str) -> str:
        make_artifact(tmp_path / f"artifact-{value}", value)
        manifest, source = open_artifact(tmp_path / f"artifact-{value}")
        catalog.publish(source, manifest, name, aliases or ("latest",))
        return manifest.version()

    return run


def test_an_artifact_round_trips(config: StoreConfig, tmp_path: Path) -> None:
    store = open_store(config)
    expected = make_artifact(tmp_path / "artifact")
    for path in (tmp_path / "artifact").rglob("*"):
        if path.is_file():
            store.put(path.relative_to(tmp_path / "artifact").as_posix(), path.read_bytes())
    manifest, source = open_artifact(config)
    assert manifest == expected
    assert [blob.block for blob in manifest.blobs] == ["layers.0", "outer"]
    done: list[int] = []
    verify_artifact(manifest, source, done.append)
    assert sum(done) == manifest.bytes_stored


def test_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid, match="deltazip compress"):
        open_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ManifestInvalid, match="not a manifest"):
        open_artifact(str(tmp_path))


def test_equal_weights_give_an_equal_version(tmp_path: Path) -> None:
    assert make_artifact(tmp_path / "a").version() == make_artifact(tmp_path / "b").version()
    assert make_artifact(tmp_path / "c", 2.0).version() != make_artifact(tmp_path / "d").version()


def test_publish_and_find(catalog: Catalog, publish: Callable[..., str], tmp_path: Path) -> None:
    version = publish(1.0)
    manifest = catalog.manifest(version)
    assert manifest == open_artifact(tmp_path / "artifact-1.0")[0]
    assert catalog.resolve(parse_ref("sorter")) == version
    assert catalog.resolve(parse_ref(f"sorter@{version[:12]}")) == version
    assert catalog.file(manifest.files["tokenizer.json"].digest) == b'{"model": 1}'
    for blob in manifest.blobs:
        buffer = bytearray(blob.object_size)
        catalog.store.read_into(catalog.blob_key(blob.object_digest), memoryview(buffer))
    assert [variant.name for variant in catalog.variants()] == ["sorter"]
    assert bases(catalog.store) == [BASE]
    assert all(key.startswith(f"{BASE}/") for key in catalog.store.list())


def test_versions_and_aliases(config: StoreConfig, catalog: Catalog, publish: Callable[..., str]) -> None:
    first, second = publish(1.0), publish(2.0, "sorter", "latest", "canary")
    assert catalog.variant("sorter").versions == [first, second]
    assert catalog.resolve(parse_ref("sorter")) == second
    catalog.set_alias("sorter", "prod", first[:16])
    catalog.set_alias("sorter", "stable", "prod")
    seen = Catalog(open_store(config), BASE).variant("sorter")
    assert seen.aliases == {"latest": second, "canary": second, "prod": first, "stable": first}
    third = publish(3.0, "sorter", "canary")
    assert catalog.variant("sorter").aliases["latest"] == second
    assert catalog.variant("sorter").aliases["canary"] == third
    publish(1.0)
    assert catalog.variant("sorter").versions == [first, second, third]
    assert catalog.resolve(parse_ref("sorter")) == first


def test_publishing_again_writes_nothing(catalog: Catalog, publish: Callable[..., str]) -> None:
    publish(1.0)
    before = catalog.store.list(f"{BASE}/variants/")
    publish(1.0)
    assert catalog.store.list(f"{BASE}/variants/") == before


def test_history_does_not_pile_up(catalog: Catalog, publish: Callable[..., str]) -> None:
    versions = [publish(float(i)) for i in range(6)]
    assert catalog.variant("sorter").versions == versions
    assert len(catalog.store.list(f"{BASE}/variants/")) <= 2


def test_a_reader_remembers_no_more_than_there_is(
    store: ObjectStore, catalog: Catalog, publish: Callable[..., str]
) -> None:
    """A router reads the variants every few seconds for months."""
    reader = Catalog(store, BASE)
    for i in range(6):
        publish(float(i % 2))
        reader.variants()
    assert len(reader._variants._read_before) <= len(store.list(f"{BASE}/variants/"))


def test_blobs_are_shared_and_mended(catalog: Catalog, publish: Callable[..., str]) -> None:
    one = catalog.manifest(publish(1.0))
    shared = catalog.blob_key(one.blobs[0].object_digest)
    catalog.store.put(shared, b"cut short")
    two = catalog.manifest(publish(2.0, "other"))
    assert one.blobs[0] == two.blobs[0]
    assert catalog.store.size(shared) == one.blobs[0].object_size
    assert len(catalog.store.list(f"{BASE}/blobs/")) == 4


def test_blobs_that_are_there_are_not_copied(catalog: Catalog, publish: Callable[..., str], tmp_path: Path) -> None:
    publish(1.0)
    manifest, source = open_artifact(tmp_path / "artifact-1.0")
    for entry in manifest.stored:
        source.delete(blob_key(entry.object_digest))
    catalog.publish(source, manifest, "copy")
    assert catalog.resolve(parse_ref("copy")) == manifest.version()


def test_progress_adds_up(catalog: Catalog, tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path / "a")
    for _ in range(2):
        done: list[int] = []
        catalog.publish(FileStore(tmp_path / "a"), manifest, "sorter", progress=done.append)
        assert sum(done) == manifest.bytes_stored


@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "missing"])
def test_damaged_artifacts_are_not_published(catalog: Catalog, tmp_path: Path, damage: str) -> None:
    manifest = make_artifact(tmp_path / "a")
    file = tmp_path / "a" / blob_key(manifest.blobs[1].object_digest)
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    changes = {"flip": bytes(data), "truncate": bytes(data[:-1]), "grow": file.read_bytes() + b"\0"}
    file.unlink() if damage == "missing" else file.write_bytes(changes[damage])
    source = FileStore(tmp_path / "a")
    with pytest.raises((BlobCorrupt, ObjectNotFound)):
        verify_artifact(manifest, source)
    with pytest.raises((BlobCorrupt, ObjectNotFound)):
        catalog.publish(source, manifest, "sorter")
    with pytest.raises(UnknownVariant):
        catalog.variant("sorter")
    with pytest.raises(ObjectNotFound):
        catalog.manifest(manifest.version())


def test_a_manifest_that_lies_about_sizes_takes_no_memory(catalog: Catalog, tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path / "a")
    blob = manifest.blobs[0].model_copy(update={"size": 1 << 60})
    lying = manifest.model_copy(update={"blobs": (blob,)})
    with pytest.raises(BlobCorrupt):
        catalog.publish(FileStore(tmp_path / "a"), lying, "sorter")


def test_another_base_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path / "a", base="c" * 64)
    with pytest.raises(BaseMismatch, match="cccccccccccc"):
        catalog.publish(FileStore(tmp_path / "a"), manifest, "sorter")
    catalog.store.put(f"{BASE}/versions/{manifest.version()}.json", manifest.canonical())
    with pytest.raises(BaseMismatch):
        catalog.manifest(manifest.version())


def test_a_manifest_under_a_wrong_name_is_refused(catalog: Catalog, publish: Callable[..., str]) -> None:
    key = f"{BASE}/versions/{publish(1.0)}.json"
    catalog.store.put(f"{BASE}/versions/{'0' * 64}.json", catalog.store.get(key))
    with pytest.raises(ManifestInvalid, match="is damaged"):
        catalog.manifest("0" * 64)


def test_a_file_with_a_wrong_digest_is_refused(catalog: Catalog, publish: Callable[..., str]) -> None:
    digest = catalog.manifest(publish(1.0)).files["tokenizer.json"].digest
    catalog.store.put(catalog.blob_key(digest), b'{"model": 2}')
    with pytest.raises(BlobCorrupt):
        catalog.file(digest)


def test_unknown_names_say_what_there_is(catalog: Catalog, publish: Callable[..., str]) -> None:
    with pytest.raises(UnknownVariant, match="none yet"):
        catalog.variant("sorter")
    version = publish(1.0)
    publish(2.0, "adder")
    with pytest.raises(UnknownVariant, match="there are: adder, sorter"):
        catalog.resolve(parse_ref("sorting"))
    with pytest.raises(UnknownVariant, match="its aliases are: latest"):
        catalog.resolve(parse_ref("sorter@prod"))
    with pytest.raises(UnknownVariant):
        catalog.resolve(parse_ref("sorter@" + "0" * 12))
    with pytest.raises(UnknownVariant):
        catalog.set_alias("nobody", "prod", version)
    with pytest.raises(UnknownVariant):
        catalog.remove("nobody")


@pytest.mark.parametrize("name", ["../x", "a/b", "http://x", "", "a\n", "x" * 65])
def test_hostile_names_reach_no_store(catalog: Catalog, tmp_path: Path, name: str) -> None:
    manifest = make_artifact(tmp_path / "a")
    for attack in (
        lambda: catalog.publish(FileStore(tmp_path / "a"), manifest, name),
        lambda: catalog.publish(FileStore(tmp_path / "a"), manifest, "sorter", [name]),
        lambda: catalog.variant(name),
        lambda: catalog.remove(name),
        lambda: catalog.set_alias(name, "prod", "latest"),
        lambda: catalog.set_alias("sorter", name, "latest"),
        lambda: catalog.manifest(name),
        lambda: catalog.file(name),
    ):
        with pytest.raises(InvalidName):
            attack()
    assert catalog.store.list() == []


def test_remove_and_publish_again(catalog: Catalog, publish: Callable[..., str]) -> None:
    publish(1.0, "sorter", "latest", "prod")
    publish(2.0, "other")
    catalog.remove("sorter")
    with pytest.raises(UnknownVariant, match="there are: other"):
        catalog.variant("sorter")
    assert [variant.name for variant in catalog.variants()] == ["other"]
    with pytest.raises(UnknownVariant):
        catalog.remove("sorter")
    again = publish(3.0)
    assert catalog.variant("sorter").versions == [again]
    assert catalog.variant("sorter").aliases == {"latest": again}


def test_concurrent_publishers_lose_nothing(config: StoreConfig, tmp_path: Path) -> None:
    publishers, rounds = 8, 4 if config.url.startswith("file:") else 1
    expected: dict[str, str] = {}
    for i in range(publishers * rounds):
        expected[f"alias-{i}"] = make_artifact(tmp_path / f"a{i}", float(i)).version()
    barrier = threading.Barrier(publishers)

    def work(worker: int) -> None:
        catalog = Catalog(open_store(config), BASE)
        for turn in range(rounds):
            i = worker * rounds + turn
            manifest, source = open_artifact(tmp_path / f"a{i}")
            barrier.wait(60)
            catalog.publish(source, manifest, "contended", ("latest", f"alias-{i}"))
            assert catalog.variant("contended").aliases[f"alias-{i}"] == manifest.version()

    with ThreadPoolExecutor(publishers) as pool:
        list(pool.map(work, range(publishers)))
    catalog = Catalog(open_store(config), BASE)
    found = catalog.variant("contended")
    latest = found.aliases.pop("latest")
    assert found.aliases == expected
    assert sorted(found.versions) == sorted(expected.values())
    assert latest in expected.values()
    assert catalog.variants()[0].aliases["latest"] == latest


def test_readers_never_miss_a_changing_variant(
    config: StoreConfig, catalog: Catalog, publish: Callable[..., str]
) -> None:
    version = publish(1.0)
    done = threading.Event()

    def read() -> int:
        reader, count = Catalog(open_store(config), BASE), 0
        while not done.is_set() or not count:
            assert version in reader.variant("sorter").versions
            assert [variant.name for variant in reader.variants()] == ["sorter"]
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for i in range(8):
                catalog.set_alias("sorter", f"a{i}", version)
        finally:
            done.set()
        assert all(reader.result() for reader in readers)


BROKEN = {
    "no JSON": b"\x80pickle",
    "another name": b'{"name": "other", "events": []}',
    "surplus": b'{"name": "broken", "events": [], "code": "x"}',
    "no digest": b'{"name": "broken", "events": [{"turn": 1, "id": "' + b"0" * 32 + b'", "version": "../x"}]}',
    "no alias": b'{"name": "broken", "events": [{"turn": 1, "id": "%s", "version": "%s", "aliases": ["../x"]}]}'
    % (b"0" * 32, b"a" * 64),
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_document_hurts_only_its_variant(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    store = FileStore(tmp_path / "store")
    catalog = Catalog(store, BASE)
    manifest = make_artifact(tmp_path / "a")
    catalog.publish(FileStore(tmp_path / "a"), manifest, "sorter")
    store.put(f"{BASE}/variants/broken/{'f' * 32}.json", BROKEN[kind])
    store.put(f"{BASE}/variants/no..name/{'f' * 32}.json", BROKEN[kind])
    with caplog.at_level(logging.WARNING):
        assert [variant.name for variant in catalog.variants()] == ["sorter"]
    assert "broken" in caplog.text
    with pytest.raises(ManifestInvalid, match="delete it and publish again"):
        catalog.variant("broken")


def test_a_publication_that_breaks_off_can_be_repeated(
    own_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in own_s3_server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{own_s3_server.new_bucket()}/store"
    catalog = Catalog(open_store(StoreConfig(url=url, timeout_s=3, max_attempts=2)), BASE)
    manifest = make_artifact(tmp_path / "a")
    with pytest.raises(StoreUnavailable):
        catalog.publish(FileStore(tmp_path / "a"), manifest, "sorter", progress=lambda _: own_s3_server.kill())
    own_s3_server.start()
    assert catalog.variants() == []
    catalog.publish(FileStore(tmp_path / "a"), manifest, "sorter")
    assert catalog.resolve(parse_ref("sorter")) == manifest.version()


def test_the_catalog_needs_no_torch() -> None:
    script = "import sys; from deltazip_ray.artifact import catalog, store; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_repair_replaces_a_damaged_blob(store: ObjectStore, tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path / "artifact")
    source, catalog = FileStore(tmp_path / "artifact"), Catalog(store, BASE)
    catalog.publish(source, manifest, "one")
    blob = manifest.blobs[0]
    key = catalog.blob_key(blob.object_digest)
    store.put(key, bytes(blob.object_size))
    catalog.publish(source, manifest, "one")
    with pytest.raises(BlobCorrupt):
        read_verified(store, key, blob)
    catalog.publish(source, manifest, "one", repair=True)
    assert read_verified(store, key, blob)
