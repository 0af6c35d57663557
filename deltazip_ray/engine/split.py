"""The split of device memory between slots and KV cache, which moves while the engine runs.

The memory of a slot could be blocks of the cache. A slot that nobody uses is lent to the cache when requests have
waited for blocks for a while. It comes back as soon as a version waits for a slot, at the price of preempting those who
hold its blocks, or when the cache has had enough for a while and none of them is held.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence

from deltazip_ray.engine.step_loop import StepLoop
from deltazip_ray.engine.versions import Versions
from deltazip_ray.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

LOOK_S = 0.02
SHORT_S = 1.0
"""How much longer requests have waited for blocks than not when a slot is lent, and again until the next one is. While
some end and others begin, a step or two has none that wait for blocks."""
CALM_S = 10.0
"""How long blocks were enough when a slot comes back that no version waits for; and between one that came back and the
next that is lent, lest they go to and fro."""


class Split:
    """Belongs to the event loop of ``versions``."""

    def __init__(
        self,
        versions: Versions,
        scheduler: Scheduler,
        steps: StepLoop,
        blocks: Sequence[range],
        least: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``blocks`` of each slot; ``least`` slots are never lent."""
        self._versions = versions
        self._scheduler = scheduler
        self._steps = steps
        self._blocks = blocks
        self._least = least
        self._clock = clock
        self._lent: list[int] = []
        self._looked_at = self._short_at = clock()
        self._short_for = 0.0
        self._back_at = clock() - CALM_S

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Move one slot, if it is time."""
        now = self._clock()
        passed, self._looked_at = now - self._looked_at, now
        if self._scheduler.admission.short:
            self._short_at = now
            self._short_for += passed
        else:
            self._short_for = max(0.0, self._short_for - passed)
        if self._lent and (self._versions.table.waiting or self._needless(now)):
            await self.take_back()
            self._back_at = now
        elif self._short_for >= SHORT_S and now - self._back_at >= CALM_S:
            await self.lend()
            self._short_for = 0.0

    async def lend(self) -> None:
        """Give the cache a slot that nobody uses, if there is one."""
        slot = await self._versions.lend(self._least)
        if slot is not None:
            self._steps.lend(self._blocks[slot])
            self._lent.append(slot)
            logger.info("slot %d is lent to the KV cache", slot)

    async def take_back(self) -> None:
        """Take the slot back that was lent last; there must be one."""
        slot = self._lent.pop()
        left = asyncio.Event()
        left_soon = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, left.set)
        self._steps.take_back(self._blocks[slot], left_soon)
        await left.wait()
        self._versions.table.take_back(slot)
        logger.info("the KV cache gave slot %d back", slot)

    def _needless(self, now: float) -> bool:
        """Whether the cache has done without the slot that was lent last."""
        return now - self._short_at >= CALM_S and self._scheduler.blocks.are_free(self._blocks[self._lent[-1]])
