"""Loads that wait for a slot: first come, first served, and passed by a bounded number of requests."""

import itertools
from collections.abc import Iterator

from deltazip_ray.residency.slot_entries import Coming


class SlotQueue:
    """Loads that have asked for a slot, in order. One is overdue when ``max_overtakes`` requests have passed it."""

    def __init__(self, max_overtakes: int) -> None:
        self._max_overtakes = max_overtakes
        self._overtakes = 0
        self._waiting: dict[str, Coming] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, version: str) -> bool:
        return version in self._waiting

    def __iter__(self) -> Iterator[Coming]:
        return iter(self._waiting.values())

    @property
    def versions(self) -> tuple[str, ...]:
        """Their versions, in order."""
        return tuple(self._waiting)

    def add(self, coming: Coming) -> None:
        """Put a load at the end."""
        coming.due = self._overtakes + self._max_overtakes
        self._waiting[coming.version] = coming

    def remove(self, version: str) -> None:
        """Take a version's load out, if it is there."""
        self._waiting.pop(version, None)

    def overtaken(self) -> None:
        """Count a request that passed all of them."""
        self._overtakes += 1

    def overdue(self) -> int:
        """Number of overdue loads: they are at the front."""
        return sum(1 for _ in itertools.takewhile(lambda coming: coming.due <= self._overtakes, self))
