"""Brings versions into slots, beside the step loop and never in its way."""

import asyncio
import contextlib
import functools
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from deltazip_ray.engine.device_slots import DeviceSlots
from deltazip_ray.errors import DeltaZipError, EngineError
from deltazip_ray.observability.engine_metrics import EngineMetrics
from deltazip_ray.residency.popularity import HALF_LIFE
from deltazip_ray.residency.slot_table import AskSlot, Pin, SlotTable
from deltazip_ray.residency.tiers import DeltaSource, HostDelta, PrefetchTier, Tier

logger = logging.getLogger(__name__)

_COPY_THREADS = 2


class Versions:
    """Versions on the device: pinned while a request uses them, loaded from ``source`` when it asks for them."""

    def __init__(
        self,
        source: DeltaSource,
        slots: DeviceSlots,
        count: int,
        metrics: EngineMetrics,
        half_life: float = HALF_LIFE,
    ) -> None:
        """``count`` slots; ``half_life`` of a request, in requests, for what stays in them."""
        self.table = SlotTable(count, cost=self._seconds_away, half_life=half_life)
        self._copy_s: dict[str, float] = {}
        self._source = source
        self._slots = slots
        self._metrics = metrics
        self._copiers = ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="deltazip-load")

    async def pin(self, version: str, timeout_s: float) -> Pin:
        """Have ``version`` in a slot until ``table.unpin``.

        Raises LoadTimeout, EngineStopped, ArtifactError, StoreError.
        """
        return await self.table.pin(version, functools.partial(self._load, version), timeout_s)

    async def prefetch(self, version: str, tier: PrefetchTier, timeout_s: float) -> bool:
        """Bring a version nearer, behind all that is wanted now; returns whether it is there."""
        try:
            there = version in self.table.resident or await self._source.prefetch(version)
            if there and tier == "device":
                there = self.table.has_room
                if there:
                    self.table.unpin(await self.pin(version, timeout_s))
        except DeltaZipError as error:
            logger.info("version %s was not prefetched: %s", version[:12], error.message)
            there = False
        self._metrics.prefetches.labels("done" if there else "dropped").inc()
        return there

    async def unload(self, version: str, *, disk: bool) -> None:
        """Free what a version takes here and on the host, as soon as nothing uses it.

        Raises ArtifactError, StoreError.
        """
        self.table.discard(version)
        await self._source.discard(version, disk=disk)

    def vocab_size(self, pin: Pin) -> int:
        """Tokens that a pinned version knows."""
        return self._slots.vocab_size(pin.slot)

    async def close(self) -> None:
        """Fail those who wait for a slot, and end the loads."""
        await self.table.close()
        self._copiers.shutdown()

    async def _load(self, version: str, ask_slot: AskSlot) -> Tier:
        """All that may be slow or fail comes before the slot, so that it costs no other version its place."""
        began = time.perf_counter()
        try:
            delta = await self._source.acquire(version)
            try:
                self._slots.check(delta.manifest)
                self._metrics.fetch_seconds.labels(delta.tier).observe(time.perf_counter() - began)
                slot = await ask_slot()
                began = time.perf_counter()
                await self._copy(slot, delta)
                copied = time.perf_counter() - began
            finally:
                await self._source.release(version)
        except DeltaZipError as error:
            self._metrics.load_failures.labels(type(error).__name__).inc()
            raise
        self._metrics.load_seconds.labels(delta.tier).observe(copied)
        resident = self.table.resident
        self._copy_s = {one: seconds for one, seconds in self._copy_s.items() if one in resident} | {version: copied}
        return delta.tier

    async def _copy(self, slot: int, delta: HostDelta) -> None:
        try:
            await _settled(asyncio.wrap_future(self._copiers.submit(self._slots.load, slot, delta)))
        except RuntimeError as error:
            raise EngineError(f"a delta could not be copied to the device ({error}): send the request again") from error

    def _seconds_away(self, version: str) -> float:
        return self._copy_s.get(version, 0.0) + self._source.seconds_away(version)


async def _settled(copy: asyncio.Future[None]) -> None:
    """Wait for a copy, even when cancelled: until it has ended it reads the host's bytes and writes the slot."""
    try:
        await asyncio.shield(copy)
    finally:
        while not copy.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({copy})
