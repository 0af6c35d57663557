"""Random pins, unpins, cancellations, deadlines and failures: the invariants hold after every event."""

import asyncio
import random
from collections import Counter

import pytest

from deltazip_ray.errors import BlobCorrupt, LoadTimeout
from deltazip_ray.residency.slot_entries import AskSlot, Pin
from deltazip_ray.residency.slot_table import SlotTable
from deltazip_ray.residency.tiers import Tier


class Device:
    """Slots that remember what was written to them, with loads that take a random number of turns of the loop."""

    def __init__(self, rng: random.Random, slots: int) -> None:
        self.rng = rng
        self.contents: list[str | None] = [None] * slots
        self.on_host: Counter[str] = Counter()

    async def load(self, version: str, ask_slot: AskSlot) -> Tier:
        self.on_host[version] += 1
        try:
            for _ in range(self.rng.randrange(6)):
                await asyncio.sleep(0)
            if self.rng.random() < 0.15:
                raise BlobCorrupt("bad luck")
            return await self.copy(version, await ask_slot())
        finally:
            self.on_host[version] -= 1

    async def copy(self, version: str, slot: int) -> Tier:
        self.contents[slot] = None
        fails = self.rng.random() < 0.15
        try:
            for _ in range(self.rng.randrange(6)):
                await asyncio.sleep(0)
                assert self.contents[slot] is None, "two loads write to one slot"
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            assert self.contents[slot] is None, "the slot was given away while it was written to"
            raise
        if fails:
            raise BlobCorrupt("bad luck")
        self.contents[slot] = version
        return "host"


async def client(rng: random.Random, table: SlotTable, device: Device, version: str) -> str:
    """One request; returns how it ended."""
    timeout_s = rng.choice([None, None, 0.0, 0.0005])
    try:
        pin: Pin = await table.pin(version, lambda ask: device.load(version, ask), timeout_s)
    except BlobCorrupt:
        return "failed"
    except LoadTimeout:
        return "late"
    try:
        for _ in range(rng.randrange(8)):
            assert device.contents[pin.slot] == version, "a pinned version left its slot"
            await asyncio.sleep(0)
    finally:
        table.unpin(pin)
    return "served"


@pytest.mark.parametrize("seed", range(12))
async def test_every_client_gets_an_answer_and_the_table_stays_sound(seed: int) -> None:
    rng = random.Random(seed)
    slots = rng.randint(1, 4)
    table, device = SlotTable(slots, max_overtakes=rng.choice([0, 2, 10])), Device(rng, slots)
    lent: list[int] = []
    versions = [f"v{index}" for index in range(rng.randint(1, 9))]
    tasks: list[asyncio.Task[str]] = []
    for _ in range(300):
        version = versions[min(int(rng.expovariate(0.7)), len(versions) - 1)]
        tasks.append(asyncio.create_task(client(rng, table, device, version)))
        if rng.random() < 0.2:
            rng.choice(tasks).cancel()
        if rng.random() < 0.2:
            move(rng, table, device, lent)
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
            table.check()
    while lent:
        table.take_back(lent.pop())
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    table.check()
    ends = [result if isinstance(result, str) else type(result).__name__ for result in results]
    assert set(ends) <= {"served", "failed", "late", "CancelledError"}
    assert ends.count("served") > 50
    assert table.waiting == ()
    for _ in range(30):  # abandoned loads end
        await asyncio.sleep(0)
    assert table.loading == frozenset()
    assert not any(device.on_host.values()), "a load has not ended"
    for version in table.resident:
        assert version in device.contents


def move(rng: random.Random, table: SlotTable, device: Device, lent: list[int]) -> None:
    """Lend a slot, whose memory then holds something else, or take one back."""
    least = rng.randint(1, 3)
    if not lent or rng.random() < 0.5:
        slot = table.lend(least)
        if slot is not None:
            device.contents[slot] = "blocks"
            lent.append(slot)
            assert least <= table.slots == len(device.contents) - len(lent)
    else:
        slot = lent.pop(rng.randrange(len(lent)))
        assert device.contents[slot] == "blocks", "a load wrote to what is lent"
        device.contents[slot] = None
        table.take_back(slot)
    table.check()


async def test_a_cold_version_is_served_within_the_bound_under_endless_hot_traffic() -> None:
    """Hot traffic whose pins overlap without end: the cold version waits for at most 8 more of them, then a drain."""
    table = SlotTable(slots=1, max_overtakes=8)
    passed = 0

    async def load(ask_slot: AskSlot) -> Tier:
        await ask_slot()
        return "host"

    pins = [await table.pin("hot", load)]
    cold = asyncio.create_task(table.pin("cold", load))
    await asyncio.sleep(0)
    hot: list[asyncio.Task[Pin]] = []
    while not cold.done():
        hot.append(asyncio.create_task(table.pin("hot", load)))
        for _ in range(3):
            await asyncio.sleep(0)
        if hot[-1].done():
            passed += 1
            pins.append(hot[-1].result())
        if pins and (len(pins) > 1 or not hot[-1].done()):
            table.unpin(pins.pop(0))
        table.check()
        assert len(hot) < 20, "the cold version starves"
    assert passed == 8
    table.unpin(await cold)
    for task in hot[passed:]:
        table.unpin(await task)
    table.check()
