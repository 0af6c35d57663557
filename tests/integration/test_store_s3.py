"""The S3 store when things go wrong: outages, broken connections, credentials."""

import os
import socket
import threading
import time
import traceback
from pathlib import Path

import pytest
from pydantic import ValidationError

from deltazip_ray.artifact.object_store import PART
from deltazip_ray.artifact.store import ObjectStore, open_store
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import BlobCorrupt, ConfigError, DeltaZipError, StoreUnavailable
from tests.support.cut_proxy import CutProxy
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server, free_ports


def store_at(endpoint: str, bucket: str, **changes: object) -> ObjectStore:
    fields = {"timeout_s": 10.0, "max_attempts": 2, "path_style": True} | changes
    return open_store(StoreConfig(url=f"s3://{bucket}/store", endpoint_url=endpoint, **fields))


def assert_no_secret(error: DeltaZipError) -> None:
    text = "".join(traceback.format_exception(error))
    assert SECRET_KEY not in error.message
    assert ACCESS_KEY not in error.message
    assert "Signature=" not in text


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "s3://bucket/../x", "s3://bucket/a?b=c", "s3://b@d/x"])
def test_urls_that_are_no_bucket(url: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=r"s3\)?://|contains credentials"):
        open_store(StoreConfig(url=url))


def test_settings_that_cannot_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="contains credentials") as caught:
        store_at("http://user:secret@127.0.0.1:1", "bucket")
    assert "secret" not in caught.value.message
    with pytest.raises(ConfigError, match="cannot connect"):
        store_at("not a url", "bucket")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(ConfigError, match="nobody-has-this"):
        store_at("http://127.0.0.1:1", "bucket", profile="nobody-has-this")


def test_the_root_of_a_bucket(s3_environment: S3Server) -> None:
    bucket = s3_environment.new_bucket()
    store = open_store(StoreConfig(url=f"s3://{bucket}"))
    store.put("a/k", b"v")
    assert store.list() == ["a/k"]
    assert store.folders() == ["a"]
    assert s3_environment.client.get_object(Bucket=bucket, Key="a/k")["Body"].read() == b"v"


def test_prefixes_keep_stores_apart(s3_environment: S3Server) -> None:
    bucket = s3_environment.new_bucket()
    one, other = (open_store(StoreConfig(url=f"s3://{bucket}/{prefix}")) for prefix in ("one", "one-more/deep/"))
    one.put("k", b"1")
    other.put("k", b"2")
    assert (one.get("k"), other.get("k")) == (b"1", b"2")
    assert one.list() == other.list() == ["k"]
    assert one.folders() == []


def test_credentials_of_a_profile(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in s3_server.environment:
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "credentials"
    file.write_text(f"[ours]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    store = store_at(s3_server.endpoint, s3_server.new_bucket(), profile="ours", region=s3_server.region)
    store.put("k", b"v")
    assert store.get("k") == b"v"


def test_no_credentials(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3_environment.new_bucket()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreUnavailable, match="set AWS_ACCESS_KEY_ID"):
        store_at(s3_environment.endpoint, bucket).list()


def test_wrong_credentials(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3_environment.new_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-of-anybody")
    store = store_at(s3_environment.endpoint, bucket)
    for use in (store.list, lambda: store.get("k"), lambda: store.put("k", b"v"), lambda: store.size("k")):
        with pytest.raises(StoreUnavailable, match="check credentials") as caught:
            use()
        assert_no_secret(caught.value)
        assert "not-the-secret" not in "".join(traceback.format_exception(caught.value))


def test_no_bucket(s3_environment: S3Server) -> None:
    store = store_at(s3_environment.endpoint, "there-is-no-such")
    for use in (store.list, lambda: store.get("k"), lambda: store.put("k", b"v")):
        with pytest.raises(StoreUnavailable, match="no such bucket"):
            use()


def test_nobody_listens(s3_environment: S3Server) -> None:
    store = store_at(f"http://127.0.0.1:{free_ports(1)[0]}", "bucket")
    buffer = bytearray(3 * PART)
    for use in (
        store.list,
        lambda: store.get("k"),
        lambda: store.put("k", b"v"),
        lambda: store.put("k", buffer),
        lambda: store.exists("k"),
        lambda: store.read_into("k", memoryview(buffer)),
    ):
        with pytest.raises(StoreUnavailable, match="does not answer") as caught:
            use()
        assert_no_secret(caught.value)


def test_a_server_that_accepts_and_says_nothing(s3_environment: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = store_at(f"http://127.0.0.1:{silent.getsockname()[1]}", "bucket", timeout_s=0.3)
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="ReadTimeoutError"):
            store.get("k")
        assert time.monotonic() - started < 10


def test_down_at_start_and_in_the_middle(own_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server = own_s3_server
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = server.new_bucket()
    data = os.urandom(64 << 20)
    store_at(server.endpoint, bucket).put("big", data)
    server.stop()
    store = store_at(server.endpoint, bucket)
    with pytest.raises(StoreUnavailable):
        store.size("big")

    server.start()
    assert store.size("big") == len(data)
    buffer = bytearray(len(data))
    watcher = threading.Thread(target=_kill_once_filled, args=(server, buffer))
    watcher.start()
    with pytest.raises(StoreUnavailable):
        store.read_into("big", memoryview(buffer))
    watcher.join()
    server.start()
    store.read_into("big", memoryview(buffer))
    assert buffer == data


def _kill_once_filled(server: S3Server, buffer: bytearray) -> None:
    deadline = time.monotonic() + 20
    while not any(buffer[:4096]) and time.monotonic() < deadline:
        time.sleep(0.001)
    server.kill()


def test_broken_connections_are_read_again(s3_environment: S3Server) -> None:
    bucket, data = s3_environment.new_bucket(), os.urandom(3 * PART + 5)
    store_at(s3_environment.endpoint, bucket).put("big", data)
    with CutProxy(s3_environment.ports["proxy"], cuts=3, after=PART // 2) as proxy:
        store = store_at(proxy.endpoint, bucket, max_attempts=4)
        buffer = bytearray(len(data))
        store.read_into("big", memoryview(buffer))
        assert buffer == data
    with CutProxy(s3_environment.ports["proxy"], cuts=2, after=PART // 2) as proxy:
        assert store_at(proxy.endpoint, bucket, max_attempts=4).get("big") == data


def test_nobody_writes_into_the_buffer_after_a_failure(s3_environment: S3Server) -> None:
    bucket = s3_environment.new_bucket()
    store_at(s3_environment.endpoint, bucket).put("big", os.urandom(12 * PART))
    buffer = bytearray(12 * PART)
    with CutProxy(s3_environment.ports["proxy"], cuts=1, after=PART // 16) as proxy:
        with pytest.raises(StoreUnavailable):
            store_at(proxy.endpoint, bucket, max_attempts=1).read_into("big", memoryview(buffer))
        left = bytes(buffer)
        time.sleep(0.5)
        assert buffer == left


def test_connections_that_always_break_are_an_outage(s3_environment: S3Server) -> None:
    bucket = s3_environment.new_bucket()
    store_at(s3_environment.endpoint, bucket).put("big", bytes(2 * PART))
    with CutProxy(s3_environment.ports["proxy"], cuts=1000, after=PART // 2) as proxy:
        store = store_at(proxy.endpoint, bucket)
        with pytest.raises(StoreUnavailable):
            store.read_into("big", memoryview(bytearray(2 * PART)))
        with pytest.raises(StoreUnavailable):
            store.get("big")


def test_a_shorter_object_is_corrupt_in_whichever_range_it_ends(s3_environment: S3Server) -> None:
    store = store_at(s3_environment.endpoint, s3_environment.new_bucket())
    for stored in (0, PART // 2, PART, PART + 1, 3 * PART - 1):
        store.put("k", bytes(stored))
        with pytest.raises(BlobCorrupt):
            store.read_into("k", memoryview(bytearray(3 * PART)))
