"""When a slot is lent to the KV cache, and when it comes back."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.split import CALM_S, SHORT_S, Split
from deltazip_ray.residency.slot_entries import AskSlot
from deltazip_ray.residency.slot_table import SlotTable
from deltazip_ray.residency.tiers import Tier
from deltazip_ray.scheduler.scheduler import Scheduler

OWN, SLOTS, EACH = 8, 3, 4


class Steps:
    """Takes commands at once."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def lend(self, blocks: range) -> None:
        self.scheduler.blocks.lend(blocks)

    def take_back(self, blocks: range, done: Callable[[], object]) -> None:
        self.scheduler.take_back(blocks)
        done()


class World:
    """A split whose time passes when it is told to."""

    def __init__(self, least: int = 1) -> None:
        self.now = 100.0
        self.table = SlotTable(SLOTS)
        self.scheduler = Scheduler(EngineConfig(kv_blocks=OWN))

        async def lend(least: int) -> int | None:
            return self.table.lend(least)

        versions: Any = SimpleNamespace(table=self.table, lend=lend)
        steps: Any = Steps(self.scheduler)
        blocks = [range(OWN + i * EACH, OWN + (i + 1) * EACH) for i in range(SLOTS)]
        self.split = Split(versions, self.scheduler, steps, blocks, least, lambda: self.now)

    async def passes(self, seconds: float, *, short: bool) -> int:
        """Blocks of the cache at the end."""
        self.scheduler.admission.short = short
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            await self.split.look()
        self.table.check()
        return self.scheduler.blocks.num_blocks


async def load(ask_slot: AskSlot) -> Tier:
    await ask_slot()
    return "host"


async def test_one_slot_after_the_other_is_lent_while_blocks_are_short_but_those_that_stay() -> None:
    world = World(least=1)
    assert await world.passes(SHORT_S / 2, short=True) == OWN
    assert await world.passes(SHORT_S / 2, short=False) == OWN
    assert await world.passes(SHORT_S + 0.2, short=True) == OWN + EACH
    assert await world.passes(60, short=True) == OWN + 2 * EACH
    assert world.table.slots == 1


async def test_blocks_are_short_though_requests_begin_between() -> None:
    world = World()
    for _ in range(2):
        assert await world.passes(SHORT_S * 0.4, short=True) == OWN
        assert await world.passes(SHORT_S * 0.1, short=False) == OWN
    assert await world.passes(SHORT_S * 0.6, short=True) == OWN + EACH


async def test_a_version_that_waits_gets_a_slot_back_at_once() -> None:
    world = World()
    await world.passes(60, short=True)
    pin = await world.table.pin("a", load)
    task = asyncio.create_task(world.table.pin("b", load))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await world.passes(0.1, short=True) == OWN + EACH
    world.table.unpin(await task)
    world.table.unpin(pin)
    assert await world.passes(CALM_S - 1, short=True) == OWN + EACH, "not to and fro"
    assert await world.passes(2, short=True) == OWN + 2 * EACH


@pytest.mark.parametrize("held", [False, True])
async def test_what_the_cache_needs_no_longer_comes_back(held: bool) -> None:
    world = World(least=2)
    assert await world.passes(5, short=True) == OWN + EACH
    found = world.scheduler.blocks.start((OWN + 1) * 16, (), 0) if held else None
    assert await world.passes(CALM_S - 1, short=False) == OWN + EACH
    assert await world.passes(2, short=False) == OWN + (EACH if held else 0)
    if found is not None:
        world.scheduler.blocks.free(found[0])
        assert await world.passes(0.1, short=False) == OWN
