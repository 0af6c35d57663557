"""Moves device memory between slots and the KV cache while the engine runs.

The memory of a slot can be used as KV blocks. An unused slot is lent to the cache when requests have been waiting for
blocks for a while. It is taken back as soon as a version waits for a slot, which preempts requests that hold its
blocks, or when the cache has had enough blocks for a while and none of the slot's is held.
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
"""A slot is lent when the time in which requests waited for blocks exceeds the time in which none did by this much. As
requests end and others start, a few steps without waiting requests are normal."""
CALM_S = 10.0
"""A slot that no version waits for is taken back after this time with enough blocks. Also the pause before the next one
is lent, so that slots do not move back and forth."""


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
        """Check periodically, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Lend or take back one slot, if it is time."""
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
        """Lend an unused slot to the cache, if there is one."""
        slot = await self._versions.lend(self._least)
        if slot is not None:
            self._steps.lend(self._blocks[slot])
            self._lent.append(slot)
            logger.info("slot %d is lent to the KV cache", slot)

    async def take_back(self) -> None:
        """Take back the slot that was lent last; there must be one."""
        slot = self._lent.pop()
        left = asyncio.Event()
        left_soon = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, left.set)
        self._steps.take_back(self._blocks[slot], left_soon)
        await left.wait()
        self._versions.table.take_back(slot)
        logger.info("the KV cache gave slot %d back", slot)

    def _needless(self, now: float) -> bool:
        """Whether the cache does not need the slot that was lent last."""
        return now - self._short_at >= CALM_S and self._scheduler.blocks.are_free(self._blocks[self._lent[-1]])
