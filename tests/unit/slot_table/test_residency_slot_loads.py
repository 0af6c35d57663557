"""Loads of the device tier: one for all who wait, abandoned, dropped, failed."""

import asyncio
import logging

import pytest

from deltazip_ray.errors import BlobCorrupt, EngineError
from deltazip_ray.residency.slot_entries import AskSlot
from deltazip_ray.residency.tiers import Tier
from tests.support.slot_bench import Bench, settle


async def test_the_first_pin_loads_and_the_second_is_warm(bench: Bench) -> None:
    first, second = await bench.pin("a"), await bench.pin("a")
    assert (first.tier, second.tier) == ("host", "device")
    assert first.slot == second.slot
    assert bench.loader.calls == [("a", first.slot)]
    assert bench.table.resident == {"a"}


async def test_concurrent_pins_make_one_load(bench: Bench) -> None:
    gate = bench.loader.hold("a")
    tasks = [await bench.start("a") for _ in range(5)]
    assert bench.table.loading == {"a"}
    gate.set()
    pins = await asyncio.gather(*tasks)
    assert len(bench.loader.calls) == 1
    assert {pin.slot for pin in pins} == {bench.loader.calls[0][1]}
    bench.table.check()


async def test_a_waiter_that_leaves_does_not_disturb_the_others(bench: Bench) -> None:
    gate = bench.loader.hold("a")
    first, second = await bench.start("a"), await bench.start("a")
    first.cancel()
    await settle()
    gate.set()
    assert (await second).slot == 0
    assert first.cancelled()
    assert bench.loader.cancelled == []


async def test_a_load_that_nobody_waits_for_goes_on_and_stays(bench: Bench) -> None:
    gate = bench.loader.hold("a")
    (await bench.start("a")).cancel()
    await settle()
    gate.set()
    await settle()
    assert bench.table.resident == {"a"}
    assert (await bench.pin("a")).tier == "device"


async def test_an_abandoned_load_makes_room_for_a_version_that_is_wanted() -> None:
    bench = Bench(slots=1)
    bench.loader.hold("a")
    abandoned = await bench.start("a")
    wanted = await bench.start("b")
    assert bench.loader.cancelled == []
    abandoned.cancel()
    assert (await wanted).version == "b"
    assert bench.loader.cancelled == ["a"]
    bench.table.check()


async def test_a_version_whose_load_was_just_cancelled_can_be_asked_for_again() -> None:
    bench = Bench(slots=1)
    bench.loader.hold("a")
    abandoned, wanted = await bench.start("a"), await bench.start("b")
    abandoned.cancel()
    await asyncio.sleep(0)
    again = asyncio.create_task(bench.pin("a"))
    bench.table.unpin(await wanted)
    bench.loader.gates["a"].set()
    assert (await again).tier == "host"
    bench.table.check()


async def test_a_failed_load_frees_the_slot_and_tells_its_waiters_only(bench: Bench) -> None:
    bad, good = bench.loader.hold("bad"), bench.loader.hold("good")
    bench.loader.errors["bad"] = BlobCorrupt("wrong digest")
    tasks = [await bench.start(name) for name in ("bad", "bad", "good", "third")]
    bad.set()
    results = await asyncio.gather(*tasks[:2], return_exceptions=True)
    assert [type(result) for result in results] == [BlobCorrupt, BlobCorrupt]
    third = await tasks[3]
    assert third.slot == next(slot for name, slot in bench.loader.calls if name == "bad")
    good.set()
    assert (await tasks[2]).version == "good"


async def test_after_a_failure_the_next_pin_tries_again(bench: Bench) -> None:
    bench.loader.errors["a"] = BlobCorrupt("wrong digest")
    with pytest.raises(BlobCorrupt):
        await bench.pin("a")
    del bench.loader.errors["a"]
    assert (await bench.pin("a")).tier == "host"


async def test_a_version_that_does_not_come_costs_nobody_a_slot() -> None:
    bench = Bench(slots=1)
    bench.table.unpin(await bench.pin("warm"))
    fetched = bench.loader.hold_fetch("bad")
    bench.loader.fetch_errors["bad"] = BlobCorrupt("wrong digest")
    bad = [await bench.start("bad") for _ in range(2)]
    fetched.set()
    results = await asyncio.gather(*bad, return_exceptions=True)
    assert [type(result) for result in results] == [BlobCorrupt, BlobCorrupt]
    assert (await bench.pin("warm")).tier == "device"
    assert bench.loader.calls == [("warm", 0)]
    assert bench.table.loading == frozenset()
    bench.table.check()


async def test_a_version_that_nobody_waits_for_gets_no_slot() -> None:
    """It is told to stop while its bytes come, or while it waits for a slot."""
    bench = Bench(slots=1)
    bench.loader.hold_fetch("fetched")
    pin = await bench.pin("a")
    tasks = [await bench.start(name) for name in ("fetched", "queued")]
    for task in tasks:
        task.cancel()
        await settle()
        bench.table.check()
    assert bench.loader.dropped == ["fetched", "queued"]
    bench.table.unpin(pin)
    assert (await bench.pin("a")).tier == "device"


async def test_a_version_that_was_dropped_can_be_asked_for_at_once(bench: Bench) -> None:
    fetched = bench.loader.hold_fetch("a")
    (await bench.start("a")).cancel()
    await asyncio.sleep(0)
    again = asyncio.create_task(bench.pin("a"))
    await settle()
    bench.table.check()
    fetched.set()
    assert (await again).tier == "host"
    assert len(bench.loader.calls) == 1


async def test_a_dropped_load_that_asks_all_the_same_gets_nothing(bench: Bench) -> None:
    """As when the bytes come in the very moment in which the last waiter leaves."""
    asked = asyncio.Event()

    async def stubborn(ask_slot: AskSlot) -> Tier:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            asked.set()
            await ask_slot()
        return "host"

    waiting = asyncio.create_task(bench.table.pin("a", stubborn))
    await settle()
    waiting.cancel()
    await settle()
    assert asked.is_set()
    assert bench.table.waiting == ()
    bench.table.check()


async def test_a_load_that_never_asks_for_a_slot_is_a_failure(bench: Bench) -> None:
    async def forgetful(ask_slot: AskSlot) -> Tier:
        del ask_slot
        return "host"

    with pytest.raises(EngineError, match="without a slot"):
        await bench.table.pin("a", forgetful)
    bench.table.check()


@pytest.mark.parametrize("slot_comes", [False, True])
async def test_a_load_that_gives_up_waiting_for_a_slot_is_a_failure(slot_comes: bool) -> None:
    bench = Bench(slots=1)
    pin = await bench.pin("a")

    async def impatient(ask_slot: AskSlot) -> Tier:
        try:
            async with asyncio.timeout(0.01):
                await ask_slot()
        except TimeoutError:
            if slot_comes:
                bench.table.unpin(pin)
            raise
        return "host"

    with pytest.raises(TimeoutError):
        await bench.table.pin("b", impatient)
    assert bench.table.waiting == ()
    bench.table.check()
    assert (await bench.pin("a")).tier == ("host" if slot_comes else "device")


async def test_a_failure_that_nobody_waits_for_is_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    gate = bench.loader.hold("a")
    bench.loader.errors["a"] = BlobCorrupt("wrong digest")
    (await bench.start("a")).cancel()
    await settle()
    with caplog.at_level(logging.WARNING):
        gate.set()
        await settle()
    assert "wrong digest" in caplog.text
    assert bench.table.loading == frozenset()


async def test_a_timeout_inside_a_load_is_reported_as_it_is(bench: Bench) -> None:
    bench.loader.errors["a"] = TimeoutError("socket")
    with pytest.raises(TimeoutError, match="socket"):
        await bench.pin("a", timeout_s=5)
