"""The device tier's rules, one by one."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest

from deltazip_ray.errors import BlobCorrupt, ConfigError, EngineError, EngineStopped, LoadTimeout
from deltazip_ray.residency.slot_table import Pin, SlotTable
from deltazip_ray.residency.tiers import Tier


class Loader:
    """Loads that end when the test says so, and that notice when two of them write to one slot."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.cancelled: list[str] = []
        self._writing: set[int] = set()

    def hold(self, version: str) -> asyncio.Event:
        """Loads of ``version`` wait for the returned event."""
        return self.gates.setdefault(version, asyncio.Event())

    def __call__(self, version: str) -> Callable[[int], Coroutine[None, None, Tier]]:
        async def load(slot: int) -> Tier:
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


async def test_every_overdue_version_closes_a_slot() -> None:
    bench = Bench(slots=2, max_overtakes=0)
    a, b = await bench.pin("a"), await bench.pin("b")
    cold = [await bench.start(name) for name in ("c", "d")]
    late = [await bench.start(name) for name in ("a", "b")]
    assert not any(task.done() for task in late)
    bench.table.unpin(b)
    bench.table.unpin(a)
    for task in cold:
        bench.table.unpin(await task)
    assert [(await task).tier for task in late] == ["host", "host"]


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


@pytest.mark.parametrize("pinned", [True, False], ids=["all slots pinned", "load hangs"])
async def test_a_deadline_ends_the_wait(pinned: bool) -> None:
    bench = Bench(slots=1)
    if pinned:
        await bench.pin("other")
    gate = bench.loader.hold("a")
    with pytest.raises(LoadTimeout, match=r"within 0\.01 s"):
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
    tasks = [await bench.start(name) for name in ("a", "b")]
    await bench.table.close()
    assert bench.loader.cancelled == ["a"]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineStopped, EngineStopped]
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
