"""Loads of an engine have two parts: to the host, which may be slow or fail, and then into a slot."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from deltazip_ray.errors import BaseMismatch, LoadTimeout, StoreUnavailable
from deltazip_ray.residency.tiers import HostDelta
from tests.support.engines import GREEDY, random_prompt, running
from tests.support.versions import BuiltVersion, MemorySource
from tests.support.waiting import until
from tests.support.zoo import Zoo

PROMPT = random_prompt(0, 12)


class SlowSource(MemorySource):
    """Versions wait for their gates, if they have one; the bytes are wiped when a version is let go."""

    def __init__(self, *versions: BuiltVersion) -> None:
        super().__init__(*versions)
        self.gates: dict[str, asyncio.Event] = {}
        self.down: set[str] = set()
        self.copies: dict[str, dict[str, bytearray]] = {}

    async def acquire(self, version: str) -> HostDelta:
        delta = await super().acquire(version)
        try:
            if version in self.gates:
                await self.gates[version].wait()
            if version in self.down:
                raise StoreUnavailable("the store does not answer: try again later")
        except (asyncio.CancelledError, StoreUnavailable):
            await self.release(version)
            raise
        self.copies[version] = {block: bytearray(view) for block, view in delta.blobs.items()}
        return replace(delta, blobs={block: memoryview(data) for block, data in self.copies[version].items()})

    async def release(self, version: str) -> None:
        await super().release(version)
        if not self.held[version]:
            for data in self.copies.pop(version, {}).values():
                data[:] = bytes(len(data))


@pytest.mark.parametrize("end", ["comes", "fails", "is late", "does not fit"])
async def test_a_version_that_comes_slowly_leaves_the_slots_to_others(zoo: Zoo, tied_zoo: Zoo, end: str) -> None:
    warm, other = (version.version for version in zoo.versions[:2])
    foreign = tied_zoo.versions[0]
    cold = foreign.version if end == "does not fit" else zoo.versions[2].version
    source = SlowSource(*zoo.versions, foreign)
    source.gates[cold] = asyncio.Event()
    async with running(zoo.base, source, slots=1, load_timeout_s=1 if end == "is late" else 60) as run:
        await run.generate(PROMPT, warm)
        waiting = asyncio.create_task(run.generate(PROMPT, cold))
        await until(lambda: cold in run.engine.stats().loading)
        for version in (warm, other, warm):
            assert await run.generate(PROMPT, version) == zoo.oracles[version].greedy(PROMPT, GREEDY.max_tokens)
        assert source.acquired == [warm, cold, other, warm]
        if end == "fails":
            source.down.add(cold)
        if end != "is late":
            source.gates[cold].set()
        error = {"fails": StoreUnavailable, "is late": LoadTimeout, "does not fit": BaseMismatch}.get(end)
        if error is None:
            assert await waiting == zoo.oracles[cold].greedy(PROMPT, GREEDY.max_tokens)
            return
        with pytest.raises(error):
            await waiting
        assert run.engine.stats().resident == {warm}
        assert run.engine.stats().evictions == 2, "of warm and other, for each other"
        assert not source.held[cold]


async def test_bytes_stay_while_a_copy_reads_them_though_its_waiters_leave(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = zoo.versions[0].version
    source = SlowSource(*zoo.versions)
    copying, may_copy = threading.Event(), threading.Event()
    async with running(zoo.base, source) as run:
        assert run.engine._parts is not None
        slots = run.engine._parts.core.slots
        load = slots.load

        def slow_load(slot: int, delta: HostDelta, usable: Callable[[], object]) -> None:
            copying.set()
            assert may_copy.wait(20)
            load(slot, delta, usable)

        monkeypatch.setattr(slots, "load", slow_load)
        waiting = [asyncio.create_task(run.generate(PROMPT, version)) for _ in range(2)]
        assert await asyncio.to_thread(copying.wait, 20)
        for task in waiting:
            task.cancel()
        await asyncio.sleep(0.02)
        assert source.held[version] == 1
        may_copy.set()
        assert await run.generate(PROMPT, version) == zoo.oracles[version].greedy(PROMPT, GREEDY.max_tokens)
        assert source.acquired == [version]
        assert not source.held[version]


async def test_both_parts_are_measured(zoo: Zoo) -> None:
    async with running(zoo.base, MemorySource(*zoo.versions, tier="remote")) as run:
        await run.generate(PROMPT, zoo.versions[0].version)
        assert run.metric("fetch_seconds_count", tier="remote") == 1
        assert run.metric("load_seconds_count", tier="remote") == 1


async def test_copies_keep_to_their_budget(zoo: Zoo) -> None:
    size = sum(len(data) for data in zoo.versions[0].blobs.values())
    async with running(zoo.base, MemorySource(*zoo.versions), copy_bytes_per_s=3 * size) as run:
        began = time.monotonic()
        await run.generate(PROMPT, zoo.versions[0].version)
        # A burst of a tenth of a second passes at once, and the last copy, when the others are paid for.
        assert time.monotonic() - began > 0.1
