"""Which version is in which slot, who uses it, and who leaves when room is needed. Nobody waits here.

A slot is free, loading, resident, or lent. What is pinned never leaves; the others stay until somebody needs the room.
Then that one goes which is worth least: popularity times the seconds that bringing it back would take, see
:mod:`popularity`. A lent slot is out of use for a while: its memory serves something else.
"""

from collections.abc import Callable, Iterator

from deltazip_ray.errors import EngineError
from deltazip_ray.residency.popularity import Popularity
from deltazip_ray.residency.slot_entries import Occupant, Pin, cancel
from deltazip_ray.residency.tiers import Tier


class Slots:
    """The books of all slots. They belong to one event loop and never touch the memory itself."""

    def __init__(self, count: int, cost: Callable[[str], float], half_life: float) -> None:
        """``cost``: seconds to bring a version back. ``half_life``: of uses, in uses. Raises ConfigError."""
        self.occupants: dict[str, Occupant] = {}
        """By version, least recently used first; they have a slot each."""
        self.cancelled: set[Occupant] = set()
        """Loads that were told to stop and still have their slots."""
        self.evictions = 0
        """Versions that had to leave since the start."""
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
        """Those that are all there."""
        return [one for one in self.occupants.values() if one.load is None]

    @property
    def has_room(self) -> bool:
        """Whether :meth:`take` would find a slot."""
        return bool(self._free) or any(self._unpinned())

    def take(self) -> int | None:
        """A slot, which is the caller's to fill or to give back; None when all are in use."""
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
        """A slot that was taken is free."""
        self._free.append(slot)

    def lend(self) -> int | None:
        """Take a slot out of use; None when all are in use."""
        slot = self.take()
        if slot is not None:
            self._lent.add(slot)
        return slot

    def take_back(self, slot: int) -> None:
        """Use a slot again that was lent."""
        self._lent.remove(slot)
        self._free.append(slot)

    def pin(self, occupant: Occupant, tier: Tier) -> Pin:
        """One more use of a resident version."""
        occupant.pins += 1
        pin = Pin(occupant.version, occupant.slot, tier)
        self._pins.add(pin)
        return pin

    def unpin(self, pin: Pin) -> None:
        """The end of a use. Raises EngineError the second time."""
        if pin not in self._pins:
            raise EngineError(f"the pin of version {pin.version[:12]} in slot {pin.slot} was given back already")
        self._pins.remove(pin)
        occupant = self.occupants[pin.version]
        occupant.pins -= 1
        self.occupants[pin.version] = self.occupants.pop(pin.version)
        self._popularity.used((pin.version,))
        if occupant.leaving and not occupant.pins:
            self.vacate(occupant)

    def vacate(self, occupant: Occupant) -> None:
        """A version leaves its slot, which is free."""
        del self.occupants[occupant.version]
        self._free.append(occupant.slot)

    def cancel(self, occupant: Occupant) -> None:
        """Have a load stop; it keeps its slot until it has ended."""
        del self.occupants[occupant.version]
        self.cancelled.add(occupant)
        cancel(occupant.load)

    def check(self) -> Iterator[str]:
        """What is wrong with the books, if anything. Linear in the slots."""
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
