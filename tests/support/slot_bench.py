"""A slot table, and loads that end when a test says so."""

import asyncio
from collections.abc import Callable, Coroutine

from deltazip_ray.residency.slot_entries import AskSlot, Pin
from deltazip_ray.residency.slot_table import SlotTable
from deltazip_ray.residency.tiers import Tier


class Loader:
    """Loads that end when the test says so, and that notice when two of them write to one slot."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fetched: dict[str, asyncio.Event] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.fetch_errors: dict[str, Exception] = {}
        self.cancelled: list[str] = []
        self.dropped: list[str] = []
        """Loads that were cancelled before they had a slot."""
        self._writing: set[int] = set()

    def hold(self, version: str) -> asyncio.Event:
        """Loads of ``version`` wait for the returned event."""
        return self.gates.setdefault(version, asyncio.Event())

    def hold_fetch(self, version: str) -> asyncio.Event:
        """Loads of ``version`` wait for the returned event before they ask for a slot."""
        return self.fetched.setdefault(version, asyncio.Event())

    def __call__(self, version: str) -> Callable[[AskSlot], Coroutine[None, None, Tier]]:
        async def load(ask_slot: AskSlot) -> Tier:
            try:
                if version in self.fetched:
                    await self.fetched[version].wait()
                if version in self.fetch_errors:
                    raise self.fetch_errors[version]
                slot = await ask_slot()
            except asyncio.CancelledError:
                self.dropped.append(version)
                raise
            assert slot not in self._writing
            self._writing.add(slot)
            self.calls.append((version, slot))
            try:
                if version in self.gates:
                    await self.gates[version].wait()
                if version in self.errors:
                    raise self.errors[version]
            except asyncio.CancelledError:
                self.cancelled.append(version)
                await asyncio.sleep(0)  # the slot is still written to for a moment
                raise
            finally:
                self._writing.remove(slot)
            return "host"

        return load


async def settle() -> None:
    """Let everything that can run, run."""
    for _ in range(10):
        await asyncio.sleep(0)


class Bench:
    """A table, its loader, and pins as tasks."""

    def __init__(self, slots: int, max_overtakes: int = 32) -> None:
        self.table = SlotTable(slots, max_overtakes)
        self.loader = Loader()

    async def pin(self, version: str, timeout_s: float | None = None) -> Pin:
        return await self.table.pin(version, self.loader(version), timeout_s)

    async def start(self, version: str) -> asyncio.Task[Pin]:
        task = asyncio.create_task(self.pin(version))
        await settle()
        self.table.check()
        return task
