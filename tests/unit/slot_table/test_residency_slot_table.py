"""Who waits for a slot, who is next, who may pass, and how it ends."""

import asyncio

import pytest

from deltazip_ray.errors import ConfigError, EngineError, EngineStopped, LoadTimeout
from deltazip_ray.residency.slot_table import SlotTable
from tests.support.slot_bench import Bench, settle


@pytest.mark.parametrize("pinned", [True, False])
async def test_what_is_resident_stays_until_the_other_ones_bytes_are_there(pinned: bool) -> None:
    bench = Bench(slots=1)
    pin = await bench.pin("warm")
    if not pinned:
        bench.table.unpin(pin)
    fetched = bench.loader.hold_fetch("cold")
    cold = await bench.start("cold")
    assert bench.table.loading == {"cold"}
    assert bench.table.waiting == ()
    warm = await bench.pin("warm")
    assert (warm.tier, bench.table.evictions) == ("device", 0)
    fetched.set()
    await settle()
    assert bench.table.waiting == ("cold",)
    bench.table.unpin(warm)
    if pinned:
        bench.table.unpin(pin)
    assert (await cold).slot == 0
    bench.table.check()


async def test_versions_queue_up_in_the_order_in_which_their_bytes_come() -> None:
    bench = Bench(slots=1)
    pin = await bench.pin("a")
    slow = bench.loader.hold_fetch("slow")
    tasks = [await bench.start(name) for name in ("slow", "quick")]
    slow.set()
    await settle()
    assert bench.table.waiting == ("quick", "slow")
    bench.table.unpin(pin)
    bench.table.unpin(await tasks[1])
    assert (await tasks[0]).version == "slow"


async def test_those_who_join_a_version_that_is_still_fetched_pass_nobody() -> None:
    bench = Bench(slots=1, max_overtakes=2)
    await bench.pin("hot")
    await bench.start("cold")
    bench.loader.hold_fetch("later")
    for _ in range(5):
        await bench.start("later")
    assert (await bench.pin("hot")).tier == "device"
    await bench.table.close()


async def test_a_version_that_opens_again_needs_no_bytes() -> None:
    """A closed version is fetched again for those who wait; when it opens they are served, and the fetch ends."""
    bench = Bench(slots=1, max_overtakes=0)
    await bench.pin("a")
    bench.loader.hold_fetch("a")
    cold, late = await bench.start("cold"), await bench.start("a")
    assert bench.table.loading == {"a"}
    cold.cancel()
    assert (await late).tier == "device"
    await settle()
    assert bench.loader.dropped == ["cold", "a"]
    bench.table.check()


async def test_the_least_recently_used_unpinned_version_leaves(bench: Bench) -> None:
    a, b = await bench.pin("a"), await bench.pin("b")
    bench.table.unpin(a)
    bench.table.unpin(b)
    bench.table.unpin(await bench.pin("a"))
    await bench.pin("c")
    assert bench.table.resident == {"a", "c"}
    assert bench.table.evictions == 1


async def test_a_pinned_version_never_leaves(bench: Bench) -> None:
    a = await bench.pin("a")
    for name in ("b", "c", "d"):
        bench.table.unpin(await bench.pin(name))
        assert "a" in bench.table.resident
    assert bench.loader.calls.count(("a", a.slot)) == 1


async def test_versions_wait_for_slots_in_order() -> None:
    bench = Bench(slots=1)
    pin = await bench.pin("a")
    tasks = [await bench.start(name) for name in ("b", "c", "b")]
    assert bench.table.waiting == ("b", "c")
    bench.table.unpin(pin)
    first = [await tasks[0], await tasks[2]]
    assert not tasks[1].done()
    for pin in first:
        bench.table.unpin(pin)
    assert (await tasks[1]).version == "c"


async def test_a_hot_version_passes_a_waiting_one_only_so_often() -> None:
    """Two slots, both hot; a cold version waits. After 3 overtakes the less pinned one is closed and drains."""
    bench = Bench(slots=2, max_overtakes=3)
    hot, warm = [await bench.pin("hot") for _ in range(3)], [await bench.pin("warm")]
    cold = await bench.start("cold")
    for _ in range(3):
        warm.append(await bench.pin("warm"))
        bench.table.unpin(warm.pop(0))
        bench.table.check()
    late = await bench.start("warm")
    assert not late.done(), "closed: queues up behind the cold one"
    assert (await bench.pin("hot")).tier == "device", "the other one stays open"
    assert not cold.done()
    bench.table.unpin(warm.pop())
    assert (await cold).version == "cold"
    assert bench.table.waiting == ("warm",)
    for pin in hot:
        bench.table.unpin(pin)
    late.cancel()
    await settle()
    bench.table.check()


async def test_every_overdue_version_closes_a_slot_but_half_of_them_stay_open() -> None:
    bench = Bench(slots=4, max_overtakes=0)
    pins = [await bench.pin(name) for name in "abcd"]
    cold = [await bench.start(name) for name in "efg"]
    late = [await bench.start(name) for name in "abcd"]
    assert [task.done() for task in late] == [False, False, True, True]
    for pin in pins[:2]:
        bench.table.unpin(pin)
    for task in cold:
        bench.table.unpin(await task)
    assert [(await task).tier for task in late] == ["host", "host", "device", "device"]


async def test_a_closed_version_opens_again_when_the_waiting_one_leaves() -> None:
    bench = Bench(slots=1, max_overtakes=0)
    await bench.pin("a")
    cold, late = await bench.start("cold"), await bench.start("a")
    assert not late.done()
    cold.cancel()
    assert (await late).tier == "device"
    assert len(bench.loader.calls) == 1
    bench.table.check()


async def test_a_version_that_opens_again_passes_those_before_it_and_that_counts() -> None:
    bench = Bench(slots=1, max_overtakes=1)
    await bench.pin("hot")
    overdue = await bench.start("overdue")
    await bench.pin("hot")
    patient, late = await bench.start("patient"), await bench.start("hot")
    overdue.cancel()
    assert (await late).tier == "device"
    assert not (await bench.start("hot")).done(), "the patient one has been passed once, which is the limit"
    assert bench.table.waiting == ("patient", "hot")
    assert not patient.done()
    await bench.table.close()


@pytest.mark.parametrize("stage", ["its bytes have not come yet", "all slots are in use", "it is being copied"])
async def test_a_deadline_ends_the_wait(stage: str) -> None:
    bench = Bench(slots=1)
    if stage == "all slots are in use":
        await bench.pin("other")
    gate = bench.loader.hold_fetch("a") if stage == "its bytes have not come yet" else bench.loader.hold("a")
    with pytest.raises(LoadTimeout, match=rf"within 0\.01 s \({stage}\)"):
        await bench.pin("a", timeout_s=0.01)
    bench.table.check()
    assert bench.table.waiting == ()
    gate.set()


async def test_a_pin_that_comes_with_the_cancellation_goes_back(bench: Bench) -> None:
    gate = bench.loader.hold("a")
    task = await bench.start("a")
    gate.set()
    for _ in range(10):  # cancel at the very moment when the pin was granted and the task has not run yet
        await asyncio.sleep(0)
        if bench.table.resident:
            break
    task.cancel()
    await settle()
    bench.table.check()
    b, c = await bench.pin("b"), await bench.pin("c")
    assert {b.slot, c.slot} == {0, 1}, "nothing is pinned by the one who left"


async def test_a_pin_is_given_back_once(bench: Bench) -> None:
    pin = await bench.pin("a")
    bench.table.unpin(pin)
    with pytest.raises(EngineError, match="already"):
        bench.table.unpin(pin)


async def test_close_answers_everybody_and_waits_for_the_loads() -> None:
    bench = Bench(slots=1)
    bench.loader.hold("a")
    bench.loader.hold_fetch("c")
    tasks = [await bench.start(name) for name in ("a", "b", "c")]
    await bench.table.close()
    assert bench.loader.cancelled == ["a"]
    assert sorted(bench.loader.dropped) == ["b", "c"]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineStopped] * 3
    with pytest.raises(EngineStopped):
        await bench.pin("a")
    bench.table.check()


async def test_pins_outlive_close() -> None:
    bench = Bench(slots=1, max_overtakes=0)
    pin = await bench.pin("a")
    waiting = await bench.start("b")
    await bench.table.close()
    bench.table.check()
    bench.table.unpin(pin)
    bench.table.check()
    with pytest.raises(EngineStopped):
        await waiting


@pytest.mark.parametrize(("slots", "overtakes"), [(0, 1), (1, -1)])
def test_nonsense_sizes_are_refused(slots: int, overtakes: int) -> None:
    with pytest.raises(ConfigError):
        SlotTable(slots, overtakes)
