"""Loads versions into slots without delaying the step loop."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from deltazip_ray.engine.device_slots import DeviceSlots
from deltazip_ray.errors import DeltaZipError, EngineError
from deltazip_ray.observability.engine_metrics import EngineMetrics
from deltazip_ray.residency.popularity import HALF_LIFE
from deltazip_ray.residency.slot_entries import AskSlot, Pin
from deltazip_ray.residency.slot_table import SlotTable
from deltazip_ray.residency.tiers import DeltaSource, HostDelta, PrefetchTier, Tier

logger = logging.getLogger(__name__)

_COPY_THREADS = 2


class Versions:
    """Versions on the device: loaded from ``source`` when a request needs them, and pinned while it uses them."""

    def __init__(
        self,
        source: DeltaSource,
        slots: DeviceSlots,
        count: int,
        metrics: EngineMetrics,
        half_life: float = HALF_LIFE,
        broken: Callable[[], object] = lambda: None,
    ) -> None:
        """``count`` slots; ``half_life`` of a use, in uses, for eviction.

        ``broken`` is called if a slot turns out to have had wrong bytes while steps used it.
        """
        self.table = SlotTable(count, cost=self._seconds_away, half_life=half_life)
        self._copy_s: dict[str, float] = {}
        self._unconfirmed: dict[int, asyncio.Task[None]] = {}
        """By slot: running copies into slots that are in use already."""
        self._broken = broken
        self._source = source
        self._slots = slots
        self._metrics = metrics
        self._copiers = ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="deltazip-load")

    async def pin(self, version: str, timeout_s: float) -> Pin:
        """Keep ``version`` in a slot until ``table.unpin``, loading it if needed.

        Raises LoadTimeout, EngineStopped, ArtifactError, StoreError.
        """
        return await self.table.pin(version, functools.partial(self._load, version), timeout_s)

    async def prefetch(self, version: str, tier: PrefetchTier, timeout_s: float) -> bool:
        """Bring a version to ``tier`` with low priority; returns whether it is there."""
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
        """Remove a version from its slot and from the host, as soon as nothing uses it.

        Raises ArtifactError, StoreError.
        """
        self.table.discard(version)
        await self._source.discard(version, disk=disk)

    async def lend(self, least: int) -> int | None:
        """See :meth:`SlotTable.lend`; nothing uses the slot's memory until ``table.take_back``."""
        slot = self.table.lend(least)
        if slot in self._unconfirmed:
            await asyncio.wait({self._unconfirmed[slot]})
        return slot

    def vocab_size(self, pin: Pin) -> int:
        """Size of the vocabulary of a pinned version."""
        return self._slots.vocab_size(pin.slot)

    async def confirm(self, pin: Pin) -> None:
        """Wait until a pinned version is completely in its slot. No token of it may be delivered before that.

        Raises StoreError and EngineError: then the content of the slot is undefined.
        """
        copy = self._unconfirmed.get(pin.slot)
        if copy is not None:
            await asyncio.shield(copy)

    async def close(self) -> None:
        """Fail all waiters, and end the loads."""
        await self.table.close()
        await asyncio.gather(*self._unconfirmed.values(), return_exceptions=True)
        self._copiers.shutdown()

    async def _load(self, version: str, ask_slot: AskSlot) -> Tier:
        """Load a version. It asks for the slot after everything that may be slow or fail."""
        began = time.perf_counter()
        try:
            delta = await self._source.acquire(version)
            try:
                self._slots.check(delta.manifest)
                self._metrics.fetch_seconds.labels(delta.tier).observe(time.perf_counter() - began)
                slot = await ask_slot()
            except BaseException:
                await self._source.release(version)
                raise
            await self._until_usable(slot, version, delta)
        except DeltaZipError as error:
            self._metrics.load_failures.labels(type(error).__name__).inc()
            raise
        return delta.tier

    async def _until_usable(self, slot: int, version: str, delta: HostDelta) -> None:
        """Fill a slot; on an idle engine, return as soon as steps can be launched that wait for the rest."""
        usable = asyncio.Event()
        copy = asyncio.create_task(self._copy(slot, version, delta, usable))
        waiting = asyncio.create_task(usable.wait())
        try:
            await asyncio.wait({copy, waiting}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _ended(copy)
            raise
        finally:
            waiting.cancel()
        if copy.done():
            copy.result()
        else:
            self._unconfirmed[slot] = copy
            copy.add_done_callback(functools.partial(self._confirmed, slot))

    async def _copy(self, slot: int, version: str, delta: HostDelta, usable: asyncio.Event) -> None:
        """Copy a held version to the device, and release it."""
        began = time.perf_counter()
        tell = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, usable.set)
        try:
            if slot in self._unconfirmed:
                await _ended(self._unconfirmed[slot])
            await _ended(asyncio.wrap_future(self._copiers.submit(self._slots.load, slot, delta, tell)))
        except RuntimeError as error:
            raise EngineError(f"a delta could not be copied to the device ({error}): send the request again") from error
        finally:
            await self._source.release(version)
        copied = time.perf_counter() - began
        self._metrics.load_seconds.labels(delta.tier).observe(copied)
        resident = self.table.resident
        self._copy_s = {one: seconds for one, seconds in self._copy_s.items() if one in resident} | {version: copied}

    def _confirmed(self, slot: int, copy: asyncio.Task[None]) -> None:
        """A copy into a slot that is in use already has ended."""
        error = None if copy.cancelled() else copy.exception()
        if error is None:
            del self._unconfirmed[slot]
        else:
            logger.critical("slot %d was used, but its bytes cannot be trusted: the engine stops", slot, exc_info=error)
            self._broken()

    def _seconds_away(self, version: str) -> float:
        return self._copy_s.get(version, 0.0) + self._source.seconds_away(version)


async def _ended(copy: asyncio.Future[None]) -> None:
    """Wait for a copy even if cancelled: until it ends, it reads the host's bytes and writes the slot."""
    try:
        await asyncio.shield(copy)
    finally:
        while not copy.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({copy})
