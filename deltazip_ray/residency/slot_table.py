"""The policy of the device tier: which versions are loaded, and in which order. The slots' state is in :mod:`slots`.

* **The slot comes last.** A load asks for a slot after everything that may be slow or fail. Until then no resident
  version has to leave for it, and it is cancelled when nobody waits for it any more.
* **Single flight.** All requests for a version wait for one load. A waiter that leaves, cancelled or timed out, does
  not affect the others. When the last one leaves a load that has a slot, the load continues and the version stays:
  half of the bytes are there, and the client may return. It is cancelled only when another version finds no slot.
* **Bounded overtaking.** Loads that find no slot queue up; requests for resident versions pass them, which keeps the
  device busy. But when ``max_overtakes`` have passed a load, the resident version with the fewest pins is closed: new
  requests for it have to queue, so that it drains and its slot becomes free. Each overdue load closes one slot; half
  of the slots stay open, so that popular versions continue while many rare ones take turns (docs/scheduling.md).
* **A failed load** frees its slot and fails its own waiters, nobody else.
"""

import asyncio
import functools
import logging
from collections.abc import Callable

from deltazip_ray.errors import ConfigError, EngineError, EngineStopped, LoadTimeout
from deltazip_ray.residency.popularity import HALF_LIFE
from deltazip_ray.residency.slot_entries import Coming, Load, Occupant, Pin, cancel, fail
from deltazip_ray.residency.slot_queue import SlotQueue
from deltazip_ray.residency.slots import Slots
from deltazip_ray.residency.tiers import Tier

logger = logging.getLogger(__name__)


class SlotTable:
    """Versions in slots. Belongs to one event loop and never touches the memory itself."""

    def __init__(
        self,
        slots: int,
        max_overtakes: int = 32,
        cost: Callable[[str], float] = lambda _: 1.0,
        half_life: float = HALF_LIFE,
    ) -> None:
        """``max_overtakes``: requests that may pass a version waiting for a slot. ``cost``: seconds to load a version
        again. ``half_life`` of a use, in uses. Raises ConfigError."""
        if slots < 1 or max_overtakes < 0:
            raise ConfigError(f"{slots} slots and {max_overtakes} overtakes: at least 1 and at least 0 are needed")
        self._slots = Slots(slots, cost, half_life)
        self._coming: dict[str, Coming] = {}
        self._dropped: set[Coming] = set()  # loads that were cancelled before they had a slot
        self._queue = SlotQueue(max_overtakes)
        self._stopped = False

    @property
    def slots(self) -> int:
        """Slots that are not lent."""
        return self._slots.count

    @property
    def evictions(self) -> int:
        """Versions evicted since the start."""
        return self._slots.evictions

    @property
    def resident(self) -> frozenset[str]:
        """Versions that are on the device."""
        return frozenset(one.version for one in self._slots.residents)

    @property
    def loading(self) -> frozenset[str]:
        """Versions being loaded, without those that wait for a slot."""
        copied = {one.version for one in self._slots.occupants.values() if one.load is not None}
        return frozenset(copied | {version for version in self._coming if version not in self._queue})

    @property
    def has_room(self) -> bool:
        """Whether a load would get a slot at once."""
        return not self._queue and self._slots.has_room

    @property
    def waiting(self) -> tuple[str, ...]:
        """Versions that wait for a slot, in order."""
        return self._queue.versions

    async def pin(self, version: str, load: Load, timeout_s: float | None = None) -> Pin:
        """Load ``version`` if it is not resident, and keep it on the device until :meth:`unpin`.

        If several callers wait for one version, the ``load`` of the first one is used. Raises LoadTimeout after
        ``timeout_s`` seconds, EngineStopped, and whatever ``load`` raises.
        """
        if self._stopped:
            raise EngineStopped("the engine has stopped: send the request to another replica")
        occupant = self._slots.occupants.get(version)
        if occupant is not None and occupant.load is None and not occupant.closed:
            pin = self._slots.pin(occupant, "device")
            self._count_overtake()
            return pin
        waiter: asyncio.Future[Pin] = asyncio.get_running_loop().create_future()
        self._join(version, load, waiter)
        try:
            await asyncio.wait({waiter}, timeout=timeout_s)
        except asyncio.CancelledError:
            self._leave(version, waiter)
            raise
        if not waiter.done():
            stage = self._stage(version)
            self._leave(version, waiter)
            raise LoadTimeout(
                f"version {version[:12]} was not on the device within {timeout_s} s ({stage}): try again later"
            )
        return waiter.result()

    def unpin(self, pin: Pin) -> None:
        """Return a pin once nothing reads the slot on its behalf any more. Raises EngineError the second time."""
        self._slots.unpin(pin)
        self._dispatch()

    def discard(self, version: str) -> None:
        """Free the slot of a resident version as soon as nobody uses it. Versions being loaded are left alone."""
        if self._slots.discard(version):
            self._dispatch()

    def lend(self, least: int) -> int | None:
        """Take a slot that nobody needs out of service, evicting if need be; None unless ``least`` remain."""
        if self._queue or self.slots <= least:
            return None
        return self._slots.lend()

    def take_back(self, slot: int) -> None:
        """Put a lent slot back into service, once its memory is not used for anything else."""
        self._slots.take_back(slot)
        self._dispatch()

    async def close(self) -> None:
        """Fail all waiters with EngineStopped, cancel the loads and wait until they have ended. Pins stay valid."""
        self._stopped = True
        stopped = EngineStopped("the engine has stopped: send the request to another replica")
        for coming in list(self._coming.values()):
            fail(coming.waiters, stopped)
            self._drop(coming)
        loading = [o for o in self._slots.occupants.values() if o.load is not None]
        for occupant in loading:
            fail(occupant.waiters, stopped)
            cancel(occupant.load)
        self._balance_closed()
        ending: list[Occupant | Coming] = [*loading, *self._slots.cancelled, *self._dropped]
        loads = [one.load for one in ending if one.load is not None]
        if loads:
            await asyncio.wait(loads)

    def check(self) -> None:
        """Raise EngineError unless slots, pins and the queue agree with the rules above. Linear in the slots."""
        residents, closed = self._slots.residents, self._slots.closed
        first = next(iter(self._queue.versions), None)
        rules = {
            "a version waits though there is room": not (self._queue and self._slots.has_room),
            "a version waits for itself": first is None or all(o.version != first for o in residents),
            "a resident version has waiters": not any(o.waiters for o in residents),
            "nobody waits for a version on its way": all(c.waiters for c in self._coming.values()),
            "the queue has what is not on its way": all(self._coming.get(c.version) is c for c in self._queue),
            "an open version is loaded again": all(o.closed for o in residents if o.version in self._coming),
            "too many or too few slots are closed": len(closed) == min(self._overdue(), len(residents)),
        }
        for problem in (*self._slots.check(), *(problem for problem, holds in rules.items() if not holds)):
            raise EngineError(f"slot table: {problem}; restart the replica and report this")

    def _join(self, version: str, load: Load, waiter: asyncio.Future[Pin]) -> None:
        """Add a waiter to the load of its version, starting one if there is none."""
        occupant, coming = self._slots.occupants.get(version), self._coming.get(version)
        if occupant is not None and occupant.load is not None:
            occupant.waiters[waiter] = None
            self._count_overtake()
        elif coming is not None:
            coming.waiters[waiter] = None
            if version in self._queue:
                self._count_overtake()
        else:
            coming = self._coming[version] = Coming(version, {waiter: None})
            coming.load = asyncio.ensure_future(load(functools.partial(self._ask, coming)))
            coming.load.add_done_callback(functools.partial(self._loaded, coming))

    def _leave(self, version: str, waiter: asyncio.Future[Pin]) -> None:
        """A waiter gives up; if it got its pin in this very moment, the pin is returned."""
        if waiter.done():
            if waiter.exception() is None:
                self.unpin(waiter.result())
            return
        if version in self._slots.occupants:
            self._slots.occupants[version].waiters.pop(waiter, None)
        coming = self._coming.get(version)
        if coming is not None:
            coming.waiters.pop(waiter, None)
            if not coming.waiters:
                self._drop(coming)
        self._dispatch()

    def _ask(self, coming: Coming) -> asyncio.Future[int]:
        """A load asks for its slot."""
        coming.place = asyncio.get_running_loop().create_future()
        if coming in self._dropped:
            coming.place.cancel()
        else:
            self._queue.add(coming)
            self._dispatch()
        return coming.place

    def _drop(self, coming: Coming) -> None:
        """Stop a load that has no slot."""
        del self._coming[coming.version]
        self._queue.remove(coming.version)
        self._dropped.add(coming)
        cancel(coming.load)

    def _stage(self, version: str) -> str:
        if version in self._queue:
            return "all slots are in use"
        return "its bytes have not come yet" if version in self._coming else "it is being copied"

    def _count_overtake(self) -> None:
        if self._queue:
            self._queue.overtaken()
            self._dispatch()

    def _dispatch(self) -> None:
        """Give free slots to the queue, then make sure that slots become free for the rest."""
        while self._queue:
            coming = next(iter(self._queue))
            occupant = self._slots.occupants.get(coming.version)
            if occupant is not None:  # It was closed in favour of others, which are gone.
                self._reopen(occupant)
                continue
            slot = self._slots.take()
            if slot is None:
                break
            self._start(coming, slot)
        self._cancel_abandoned()
        self._balance_closed()

    def _start(self, coming: Coming, slot: int) -> None:
        """Give a load its slot."""
        self._queue.remove(coming.version)
        del self._coming[coming.version]
        coming.occupant = Occupant(coming.version, slot, coming.waiters, coming.load)
        self._slots.occupants[coming.version] = coming.occupant
        if coming.place is not None and not coming.place.cancelled():  # otherwise the load is about to end
            coming.place.set_result(slot)

    def _loaded(self, coming: Coming, load: asyncio.Future[Tier]) -> None:
        """A load has ended, successfully or not, with or without a slot."""
        error = EngineStopped("the load was cancelled") if load.cancelled() else load.exception()
        if coming.occupant is not None:
            self._filled(coming.occupant, load, error)
        elif coming in self._dropped:
            self._dropped.remove(coming)
        else:
            del self._coming[coming.version]
            self._queue.remove(coming.version)
            fail(coming.waiters, error or EngineError("a load ended without a slot; report this"))
        self._dispatch()

    def _filled(self, occupant: Occupant, load: asyncio.Future[Tier], error: BaseException | None) -> None:
        occupant.load = None
        if occupant in self._slots.cancelled:
            self._slots.cancelled.remove(occupant)
            self._slots.give_back(occupant.slot)
        elif error is None:
            for waiter in occupant.waiters:
                waiter.set_result(self._slots.pin(occupant, load.result()))
            occupant.waiters.clear()
        else:
            self._slots.vacate(occupant)
            if not occupant.waiters:
                logger.warning("version %s did not load, but nobody waits for it: %r", occupant.version[:12], error)
            fail(occupant.waiters, error)

    def _cancel_abandoned(self) -> None:
        """Cancel loads that nobody waits for, one for each version that waits for a slot."""
        abandoned = [o for o in self._slots.occupants.values() if o.load is not None and not o.waiters]
        for occupant in abandoned[: max(0, len(self._queue) - len(self._slots.cancelled))]:
            self._slots.cancel(occupant)

    def _balance_closed(self) -> None:
        """Keep as many resident versions closed as there are overdue ones (see :meth:`_overdue`)."""
        for occupant in sorted(self._slots.closed, key=lambda o: o.pins)[self._overdue() :]:
            self._reopen(occupant)
        missing = max(0, self._overdue() - len(self._slots.closed))
        for occupant in sorted((o for o in self._slots.residents if not o.closed), key=lambda o: o.pins)[:missing]:
            occupant.closed = True

    def _overdue(self) -> int:
        """Number of overdue versions; at most half of the slots."""
        return min(self._queue.overdue(), max(1, self.slots // 2))

    def _reopen(self, occupant: Occupant) -> None:
        """Accept pins again, and pin for the waiters that came meanwhile."""
        occupant.closed = False
        coming = self._coming.get(occupant.version)
        if coming is not None:
            for waiter in coming.waiters:
                waiter.set_result(self._slots.pin(occupant, "device"))
            coming.waiters.clear()
            self._drop(coming)
            self._queue.overtaken()
