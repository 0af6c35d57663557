"""The device tier's rules, one by one."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest

from deltazip_ray.errors import BlobCorrupt, ConfigError, EngineError, EngineStopped, LoadTimeout
from deltazip_ray.residency.slot_table import AskSlot, Pin, SlotTable
from deltazip_ray.residency.tiers import Tier


class Loader:
    """Loads that end when the test says so, and that notice when two of them write to one slot."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fetched: dict[str, asyncio.Event] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.fetch_errors: dict[str, Exception] = {}
        self.cancelled: list[str] = []
        self.dropped: list[str] = []
        """Loads that were cancelled before they had a slot."""
        self._writing: set[int] = set()

    def hold(self, version: str) -> asyncio.Event:
        """Loads of ``version`` wait for the returned event."""
        return self.gates.setdefault(version, asyncio.Event())

    def hold_fetch(self, version: str) -> asyncio.Event:
        """Loads of ``version`` wait for the returned event before they ask for a slot."""
        return self.fetched.setdefault(version, asyncio.Event())

    def __call__(self, version: str) -> Callable[[AskSlot], Coroutine[None, None, Tier]]:
        async def load(ask_slot: AskSlot) -> Tier:
            try:
                if version in self.fetched:
                    await self.fetched[version].wait()
                if version in self.fetch_errors:
                    raise self.fetch_errors[version]
                slot = await ask_slot()
            except asyncio.CancelledError:
                self.dropped.append(version)
                raise
            assert slot not in self._writing
            self._writing.add(slot)
            self.calls.append((version, slot))
            try:
                if version in self.gates:
                    await self.gates[version].wait()
                if version in self.errors:
                    raise self.errors[version]
            except asyncio.CancelledError:
                self.cancelled.append(version)
                await asyncio.sleep(0)  # the slot is still written to for a moment
                raise
            finally:
                self._writing.remove(slot)
            return "host"

        return load


async def settle() -> None:
    """Let everything that can run, run."""
    for _ in range(10):
        await asyncio.sleep(0)


class Bench:
    """A table, its loader, and pins as tasks."""

    def __init__(self, slots: int, max_overtakes: int = 32) -> None:
        self.table = SlotTable(slots, max_overtakes)
        self.loader = Loader()

    async def pin(self, version: str, timeout_s: float | None = None) -> Pin:
        return await self.table.pin(version, self.loader(version), timeout_s)

    async def start(self, version: str) -> asyncio.Task[Pin]:
        task = asyncio.create_task(self.pin(version))
        await settle()
        self.table.check()
        return task


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench(slots=2)
    yield made
    await made.table.close()
    made.table.check()


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


async def test_a_timeout_inside_a_load_is_reported_as_it_is(bench: Bench) -> None:
    bench.loader.errors["a"] = TimeoutError("socket")
    with pytest.raises(TimeoutError, match="socket"):
        await bench.pin("a", timeout_s=5)


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
