"""What clients get while the store of one version goes wrong: status, reason and Retry-After, and that others go on."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from deltazip_ray.config import BreakerConfig
from tests.support.chaos_app import NAMES, ChaosApp, Models, chaos_app
from tests.support.fault_proxy import (
    ALWAYS,
    Fault,
    FaultProxy,
    flipped,
    refused,
    reset,
    slow,
    stalled,
    trickling,
    truncated,
)
from tests.support.s3 import ACCESS_KEY
from tests.support.serve_app import wait_until


@dataclass(frozen=True)
class Case:
    """A fault, how often it happens, and what the client of the version gets."""

    fault: Fault
    times: int = ALWAYS
    status: int = 503
    code: str | None = "store_unavailable"
    reason: str = ""
    retry_after: str | None = "2"
    store_timeout_s: float = 5.0
    load_timeout_s: float = 10.0


ONE_VERSION = 100_000
"""Bytes in which one version has room, and no second one."""
SERVED = {"status": 200, "code": None, "retry_after": None}
CASES = {
    "slow": Case(slow(0.2), **SERVED),
    "one reset": Case(reset(), 1, **SERVED),
    "one wrong bit": Case(flipped(), 1, **SERVED),
    "one SlowDown": Case(refused(503, "SlowDown", retry_after="1"), 1, **SERVED),
    "resets": Case(reset(), reason="does not answer"),
    "truncated": Case(truncated(), reason="does not answer"),
    "stalls": Case(stalled(), reason="ReadTimeoutError", store_timeout_s=1.5),
    "SlowDown": Case(refused(503, "SlowDown"), reason="SlowDown"),
    "SlowDown, 7 s": Case(refused(503, "SlowDown", retry_after="7"), reason="SlowDown", retry_after="7"),
    "internal errors": Case(refused(500, "InternalError"), reason="InternalError"),
    "expired credentials": Case(refused(400, "ExpiredToken"), reason="have expired"),
    "denied": Case(refused(403, "AccessDenied"), reason="refuses access"),
    "no bucket": Case(refused(404, "NoSuchBucket"), reason="no such bucket"),
    "no blob": Case(refused(404, "NoSuchKey"), status=500, code="variant_unusable", reason="has no", retry_after=None),
    "wrong bits": Case(
        flipped(), status=500, code="variant_unusable", reason="do not match its digest", retry_after=None
    ),
    "trickle": Case(
        trickling(0.05), code="load_timeout", reason="bytes have not come", retry_after="5", load_timeout_s=1.5
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_a_sick_version_hurts_only_itself(
    name: str, models: Models, bucket: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    caplog.set_level(logging.INFO)
    engine = {"load_timeout_s": case.load_timeout_s}
    async with chaos_app(models, bucket, proxy, engine=engine, store_timeout_s=case.store_timeout_s) as app:
        assert (await app.ask("warm")).status_code == 200
        proxy.inject(case.fault, models.blob("sick"), case.times)
        sick = asyncio.create_task(app.ask("sick"))
        for other in ("warm", "base", "cold", "cold"):
            assert (await app.ask(other)).status_code == 200
        answer = await sick
        assert answer.status_code == case.status, answer.text
        assert answer.headers.get("retry-after") == case.retry_after
        if case.code is not None:
            error = answer.json()["error"]
            assert error["code"] == case.code
            assert case.reason in error["message"]
        proxy.heal()
        proxy.released.set()
        assert await until_served(app, "sick")
        await app.check()
        for text in (answer.text, caplog.text):
            assert ACCESS_KEY not in text
            assert "Signature" not in text


@pytest.mark.parametrize("what", ["manifest", "tokenizer"])
async def test_a_version_whose_small_files_go_wrong(what: str, models: Models, bucket: str, proxy: FaultProxy) -> None:
    """They are read by the router, and the manifest by the node store too."""
    sick = models.versions["sick"]
    match = f"/versions/{sick.version}" if what == "manifest" else sick.manifest.files["tokenizer.json"].digest
    async with chaos_app(models, bucket, proxy) as app:
        proxy.inject(refused(503, "SlowDown"), match)
        answer = await app.ask("sick")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        proxy.heal()
        proxy.inject(flipped(), match)
        answer = await app.ask("sick")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "variant_unusable")
        assert "publish the version again" in answer.json()["error"]["message"]
        assert (await app.ask("base")).status_code == 200
        proxy.heal()
        proxy.inject(flipped(), match, times=1)
        assert (await app.ask("sick")).status_code == 200


async def until_served(app: ChaosApp, model: str) -> bool:
    """Whether it is, once quarantine and breaker let a try through."""
    for _ in range(40):
        if (await app.ask(model)).status_code == 200:
            return True
        await asyncio.sleep(0.1)
    return False


async def test_an_open_breaker_answers_at_once_and_says_when(models: Models, bucket: str, proxy: FaultProxy) -> None:
    async with chaos_app(models, bucket, proxy, breaker=BreakerConfig(failures=2, backoff_s=20)) as app:
        proxy.inject(refused(404, "NoSuchBucket"), models.blob("sick"))
        for _ in range(2):
            assert (await app.ask("sick")).status_code == 503
        asked = proxy.count(models.blob("sick"))
        refusal = await app.ask("sick")
        assert proxy.count(models.blob("sick")) == asked
        assert refusal.status_code == 503
        assert 9 < int(refusal.headers["retry-after"]) <= 20
        assert "failed 2 times in a row" in refusal.json()["error"]["message"]
        assert app.metric("host_open_breakers") == 1
        assert (await app.ask("cold")).status_code == 200


async def test_a_damaged_blob_is_put_in_quarantine_and_counted(models: Models, bucket: str, proxy: FaultProxy) -> None:
    async with chaos_app(models, bucket, proxy, quarantine_s=60) as app:
        proxy.inject(flipped(), models.blob("sick"))
        assert (await app.ask("sick")).status_code == 500
        asked = proxy.count(models.blob("sick"))
        refusal = await app.ask("sick")
        assert refusal.status_code == 500
        assert "publish the version again with --repair" in refusal.json()["error"]["message"]
        assert (proxy.count(models.blob("sick")), asked) == (2, 2)
        assert app.metric("host_quarantined_blobs") == 1
        assert app.metric("host_refetches_total") == 1


async def test_all_of_the_store_away_leaves_what_is_here(models: Models, bucket: str, proxy: FaultProxy) -> None:
    async with chaos_app(models, bucket, proxy) as app:
        assert (await app.ask("warm")).status_code == 200
        proxy.inject(reset(0.0))
        assert [(await app.ask(name)).status_code for name in ("warm", "base", "cold")] == [200, 200, 503]
        proxy.heal()
        assert await until_served(app, "cold")


async def test_an_arena_full_of_what_is_held_says_so_and_recovers(
    models: Models, bucket: str, proxy: FaultProxy
) -> None:
    async with chaos_app(models, bucket, proxy, arena_bytes=ONE_VERSION, room_timeout_s=0.3) as app:
        await app.cache.acquire(models.versions["warm"].version)
        answer = await app.ask("cold")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert "of the host arena" in answer.json()["error"]["message"]
        assert "raise node_store.arena_bytes" in answer.json()["error"]["message"]
        assert app.metric("host_failures_total", error="StoreFull") == 1
        assert (await app.ask("warm")).status_code == 200
        await app.cache.release(models.versions["warm"].version)
        assert (await app.ask("cold")).status_code == 200


async def test_slots_full_of_what_is_used_say_so_and_recover(models: Models, bucket: str, proxy: FaultProxy) -> None:
    async with chaos_app(models, bucket, proxy, engine={"slots": 1, "load_timeout_s": 0.5}) as app:
        assert app.engine._parts is not None
        versions = app.engine._parts.versions
        pin = await versions.pin(models.versions["warm"].version, 5)
        answer = await app.ask("cold")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "all slots are in use" in answer.json()["error"]["message"]
        assert (await app.ask("warm")).status_code == 200
        versions.table.unpin(pin)
        assert await until_served(app, "cold")


async def test_a_disk_that_cannot_be_used_costs_no_request(
    models: Models, bucket: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    async with chaos_app(models, bucket, proxy, disk_dir=tmp_path / "file") as app:
        assert [(await app.ask(name)).status_code for name in NAMES] == [200, 200, 200]
        assert app.metric("disk_failures_total", operation="read") > 0


async def test_a_disk_that_was_damaged_is_healed_from_the_store(
    models: Models, bucket: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    blobs = models.versions["warm"].manifest.blobs

    def damage() -> None:
        wait_until(lambda: len(list(tmp_path.glob("*-*"))) == 1 + len(blobs))
        (file,) = tmp_path.glob(f"{blobs[0].digest}-*")
        file.write_bytes(bytes(file.stat().st_size))

    for damaged in (0, 1):
        async with chaos_app(models, bucket, proxy, disk_dir=tmp_path) as app:
            assert (await app.ask("warm")).status_code == 200
            assert app.metric("disk_damaged_total") == damaged
            await asyncio.to_thread(damage)
