"""The state of all slots: which version is in which, its pins, and which version to evict. Nothing waits here.

A slot is free, loading, resident, or lent. Pinned versions never leave; others stay until a slot is needed. Then the
least valuable one is evicted, by popularity times the seconds to load it again (see :mod:`popularity`). A lent slot is
out of service: its memory is used for something else.
"""

from collections.abc import Callable, Iterator

from deltazip_ray.errors import EngineError
from deltazip_ray.residency.popularity import Popularity
from deltazip_ray.residency.slot_entries import Occupant, Pin, cancel
from deltazip_ray.residency.tiers import Tier


class Slots:
    """The state of all slots. Belongs to one event loop and never touches the memory itself."""

    def __init__(self, count: int, cost: Callable[[str], float], half_life: float) -> None:
        """``cost``: seconds to load a version again. ``half_life`` of a use, in uses. Raises ConfigError."""
        self.occupants: dict[str, Occupant] = {}
        """By version, least recently used first."""
        self.cancelled: set[Occupant] = set()
        """Cancelled loads, which keep their slots until they have ended."""
        self.evictions = 0
        """Versions evicted since the start."""
        self._all = count
        self._free = list(range(count - 1, -1, -1))
        self._lent: set[int] = set()
        self._pins: set[Pin] = set()
        self._cost = cost
        self._popularity = Popularity[str](half_life)

    @property
    def count(self) -> int:
        """Slots that are not lent."""
        return self._all - len(self._lent)

    @property
    def residents(self) -> list[Occupant]:
        """Versions that are completely loaded."""
        return [one for one in self.occupants.values() if one.load is None]

    @property
    def closed(self) -> list[Occupant]:
        """Residents that accept no new pins."""
        return [one for one in self.residents if one.closed]

    @property
    def has_room(self) -> bool:
        """Whether :meth:`take` would find a slot."""
        return bool(self._free) or any(self._unpinned())

    def take(self) -> int | None:
        """Take a slot, evicting a version if needed; None when all are in use. The caller fills it or gives it back."""
        if self._free:
            return self._free.pop()
        victim = min(
            self._unpinned(), key=lambda o: self._popularity.worth(o.version, self._cost(o.version)), default=None
        )
        if victim is None:
            return None
        del self.occupants[victim.version]
        self.evictions += 1
        return victim.slot

    def give_back(self, slot: int) -> None:
        """Free a slot that was taken."""
        self._free.append(slot)

    def lend(self) -> int | None:
        """Take a slot out of service; None when all are in use."""
        slot = self.take()
        if slot is not None:
            self._lent.add(slot)
        return slot

    def take_back(self, slot: int) -> None:
        """Put a lent slot back into service."""
        self._lent.remove(slot)
        self._free.append(slot)

    def pin(self, occupant: Occupant, tier: Tier) -> Pin:
        """Pin a resident version."""
        occupant.pins += 1
        pin = Pin(occupant.version, occupant.slot, tier)
        self._pins.add(pin)
        return pin

    def unpin(self, pin: Pin) -> None:
        """Return a pin. Raises EngineError the second time."""
        if pin not in self._pins:
            raise EngineError(f"the pin of version {pin.version[:12]} in slot {pin.slot} was returned already")
        self._pins.remove(pin)
        occupant = self.occupants[pin.version]
        occupant.pins -= 1
        self.occupants[pin.version] = self.occupants.pop(pin.version)
        self._popularity.used((pin.version,))
        if occupant.leaving and not occupant.pins:
            self.vacate(occupant)

    def vacate(self, occupant: Occupant) -> None:
        """Remove a version and free its slot."""
        del self.occupants[occupant.version]
        self._free.append(occupant.slot)

    def discard(self, version: str) -> bool:
        """Remove a resident version once it has no pins; whether it is gone now."""
        occupant = self.occupants.get(version)
        if occupant is None or occupant.load is not None:
            return False
        if occupant.pins:
            occupant.leaving = True
            return False
        self.vacate(occupant)
        return True

    def cancel(self, occupant: Occupant) -> None:
        """Cancel a load; it keeps its slot until it has ended."""
        del self.occupants[occupant.version]
        self.cancelled.add(occupant)
        cancel(occupant.load)

    def check(self) -> Iterator[str]:
        """Inconsistencies, if any. Linear in the slots."""
        taken = [o.slot for o in (*self.occupants.values(), *self.cancelled)]
        if sorted([*taken, *self._free, *self._lent]) != list(range(self._all)):
            yield "a slot is lost or taken twice"
        if any(o.pins != sum(p.slot == o.slot for p in self._pins) for o in self.residents):
            yield "pins do not add up"
        if len(self._pins) != sum(o.pins for o in self.occupants.values()):
            yield "a version is pinned that is not resident"

    def _unpinned(self) -> Iterator[Occupant]:
        """Residents that may leave."""
        return (one for one in self.residents if not one.pins)
