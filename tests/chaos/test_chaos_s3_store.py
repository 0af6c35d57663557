"""The S3 store behind a server that goes wrong: what each fault becomes, how long it takes, and that it ends."""

import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from deltazip_ray.artifact import s3_store
from deltazip_ray.artifact.object_store import PART
from deltazip_ray.artifact.s3_store import PARALLEL
from deltazip_ray.artifact.store import ObjectStore, open_store
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import DeltaZipError, StoreFull, StoreUnavailable
from tests.support.fault_proxy import (
    Fault,
    FaultProxy,
    flipped,
    refused,
    reset,
    slow,
    stalled,
    trickling,
    trickling_headers,
    truncated,
)
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.serve_app import wait_until

DATA = os.urandom(PART + 5)


@pytest.fixture
def bucket(s3_environment: S3Server) -> str:
    return s3_environment.new_bucket()


def store_at(proxy: FaultProxy, bucket: str, **changes: object) -> ObjectStore:
    fields = {"timeout_s": 0.5, "max_attempts": 2, "path_style": True} | changes
    return open_store(StoreConfig(url=f"s3://{bucket}/store", endpoint_url=proxy.endpoint, **fields))


def read(store: ObjectStore) -> bytes:
    buffer = bytearray(len(DATA))
    store.read_into("blob", memoryview(buffer))
    return bytes(buffer)


def test_without_faults_the_proxy_is_not_noticed(proxy: FaultProxy, bucket: str) -> None:
    store = store_at(proxy, bucket, timeout_s=10)
    store.put("blob", DATA)
    store.put("large", DATA * 3)
    assert read(store) == DATA == store.get("blob")
    assert store.size("large") == 3 * len(DATA)
    assert store.list() == ["blob", "large"]
    store.delete("large")
    assert not store.exists("large")


@pytest.mark.parametrize(
    "fault",
    [
        slow(0.1),
        reset(0.5),
        reset(0.0),
        truncated(),
        stalled(0.0),
        stalled(0.7),
        refused(503, "SlowDown"),
        refused(500, "InternalError"),
        refused(502, ""),
    ],
    ids=["slow", "reset", "early reset", "truncated", "silent", "stalled", "503", "500", "502"],
)
def test_a_fault_that_happens_once_is_not_noticed(proxy: FaultProxy, bucket: str, fault: Fault) -> None:
    store = store_at(proxy, bucket, timeout_s=1.5)
    store.put("blob", DATA)
    proxy.inject(fault, "blob", times=1)
    assert read(store) == DATA


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (reset(), "does not answer"),
        (truncated(), "does not answer"),
        (stalled(), "does not answer"),
        (stalled(0.0), "does not answer"),
        (refused(503, "SlowDown"), "SlowDown.*try again later"),
        (refused(500, "InternalError"), "InternalError.*try again later"),
        (refused(400, "ExpiredToken"), "expired.*renew"),
        (refused(403, "ExpiredToken"), "expired.*renew"),
        (refused(404, "NoSuchBucket"), "no such bucket"),
        (refused(403, "AccessDenied"), "check credentials"),
    ],
    ids=[
        *("reset", "truncated", "stalled", "silent", "503", "500", "expired 400", "expired 403", "no bucket"),
        "denied",
    ],
)
def test_a_fault_that_stays_is_an_outage_until_it_ends(
    proxy: FaultProxy, bucket: str, fault: Fault, message: str
) -> None:
    store = store_at(proxy, bucket)
    store.put("blob", DATA)
    proxy.inject(fault)
    with pytest.raises(StoreUnavailable, match=message):
        read(store)
    proxy.heal()
    assert read(store) == DATA


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["before the answer", "in the body"])
def test_one_read_takes_no_more_attempts_than_it_may(proxy: FaultProxy, bucket: str, share: float) -> None:
    store = store_at(proxy, bucket, timeout_s=0.2, max_attempts=3)
    store.put("small", b"12345678")
    proxy.inject(stalled(share) if share else slow(5))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.get("small")
    assert proxy.count("small") == 3
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("size", [10, 20 << 20], ids=["small", "in parts"])
def test_what_cannot_be_written_says_why_and_can_be_written_later(proxy: FaultProxy, bucket: str, size: int) -> None:
    store = store_at(proxy, bucket, timeout_s=5)
    for fault, error, message in (
        (refused(503, "SlowDown"), StoreUnavailable, "try again later"),
        (refused(403, "AccessDenied"), StoreUnavailable, "check credentials"),
        (refused(403, "QuotaExceeded"), StoreFull, "raise the quota"),
    ):
        proxy.inject(fault, method="PUT")
        with pytest.raises(error, match=message):
            store.put("written", bytes(size))
        assert not store.exists("written")
        proxy.heal()
    proxy.inject(refused(503, "SlowDown"), method="PUT", times=1)
    store.put("written", bytes(size))
    assert store.size("written") == size


def test_wrong_bytes_pass_the_store_for_it_knows_no_digest(proxy: FaultProxy, bucket: str) -> None:
    store = store_at(proxy, bucket)
    store.put("blob", DATA)
    proxy.inject(flipped(), "blob", times=1)
    assert read(store) != DATA
    assert read(store) == DATA


def test_the_servers_own_wish_for_a_pause_is_passed_on(proxy: FaultProxy, bucket: str) -> None:
    store = store_at(proxy, bucket, max_attempts=1)
    for given, expected in (
        ("7", 7.0),
        ("0", 0.0),
        (None, None),
        ("Fri, 31 Dec 2100 23:59:59 GMT", None),
        ("-5", None),
    ):
        proxy.inject(refused(503, "SlowDown", retry_after=given), times=1)
        with pytest.raises(StoreUnavailable) as caught:
            store.get("blob")
        assert caught.value.retry_after_s == expected


def test_an_object_that_trickles_takes_nobody_elses_connections(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "PART", 1024)
    store, sick, sound = store_at(proxy, bucket, timeout_s=5), DATA[: 3 * PARALLEL * 1024], DATA[:3000]
    store.put("sick", sick)
    store.put("sound", sound)
    proxy.inject(trickling(0.05), "sick")
    buffer = bytearray(len(sound))
    with ThreadPoolExecutor(2) as readers:
        readers.submit(store.read_into, "sick", memoryview(bytearray(len(sick))))
        try:
            wait_until(lambda: proxy.count("sick") == PARALLEL)
            readers.submit(store.read_into, "sound", memoryview(buffer)).result(timeout=15)
        finally:
            proxy.released.set()
    assert buffer == sound


def test_headers_that_trickle_come_to_an_end(proxy: FaultProxy, bucket: str) -> None:
    store = store_at(proxy, bucket, timeout_s=0.2)
    store.put("sick", DATA[:1000])
    proxy.inject(trickling_headers(0.03), "sick")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="ReadTimeout"):
        store.get("sick")
    assert proxy.count("sick") >= 2, "it is tried again"
    assert time.monotonic() - began < 10
    proxy.heal()
    assert store.get("sick") == DATA[:1000]


@pytest.mark.parametrize("size", [1000, PART + 5], ids=["small", "in parts"])
def test_a_body_that_trickles_comes_to_an_end(proxy: FaultProxy, bucket: str, size: int) -> None:
    store = store_at(proxy, bucket, timeout_s=0.1)
    store_at(proxy, bucket, timeout_s=10).put("sick", DATA[:size])
    proxy.inject(trickling(0.03), "sick")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.read_into("sick", memoryview(bytearray(size)))
    assert proxy.count("sick") >= 2, "it is tried again"
    assert time.monotonic() - began < 10
    proxy.heal()
    buffer = bytearray(size)
    store.read_into("sick", memoryview(buffer))
    assert buffer == DATA[:size]


def test_nothing_that_a_server_wrote_gets_into_errors(proxy: FaultProxy, bucket: str) -> None:
    store = store_at(proxy, bucket, max_attempts=1)
    quoted = f"the string to sign was {SECRET_KEY} of {ACCESS_KEY}, Signature=0123"
    for status, code in ((403, "SignatureDoesNotMatch"), (400, "ExpiredToken"), (500, "InternalError")):
        proxy.inject(refused(status, code, message=quoted), times=1)
        with pytest.raises(DeltaZipError) as caught:
            store.get("blob")
        assert "string to sign" not in "".join(traceback.format_exception(caught.value))
