"""Requests that are refused, cancelled, overtaken by loads, or hit by a failure; and an engine that stops."""

import asyncio
import math
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from deltazip_kernels import PackedDelta
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.engine.step_loop import MOST_FAILURES
from deltazip_ray.errors import (
    BaseMismatch,
    BlobCorrupt,
    EngineError,
    EngineStopped,
    InvalidRequest,
    LoadTimeout,
    Overloaded,
    PromptTooLong,
)
from deltazip_ray.layers.targets import MatrixTarget
from deltazip_ray.residency.tiers import HostDelta
from deltazip_ray.scheduler.request import GenerateRequest, Matcher, SamplingParams, Structure
from tests.support.engines import GREEDY, SETTINGS, RunningEngine, random_prompt, running
from tests.support.versions import MemorySource
from tests.support.waiting import until
from tests.support.zoo import Zoo

PROMPT = random_prompt(0, 12)
LONG = SamplingParams(max_tokens=200, temperature=0.0)


class SlowSource(MemorySource):
    """Brings versions only when it is told to."""

    gate: asyncio.Event

    async def acquire(self, version: str) -> HostDelta:
        delta = await super().acquire(version)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            await self.release(version)
            raise
        return delta


class AnyToken:
    """A matcher that any output matches."""

    def accept(self, token: int) -> None:
        pass

    def allowed(self) -> NDArray[np.int32]:
        return np.full(8, -1, dtype=np.int32)


def slow_source(zoo: Zoo) -> SlowSource:
    source = SlowSource(*zoo.versions)
    source.gate = asyncio.Event()
    return source


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": []}, InvalidRequest, "the prompt is empty"),
        ({"prompt": [5] * 250}, PromptTooLong, "exceed the context of 256"),
        ({"prompt": [5, -1]}, InvalidRequest, "token -1 is not in the vocabulary of the base"),
        ({"prompt": [5, 10**9]}, InvalidRequest, r"not in the vocabulary of the base \(0 to 85\)"),
        ({"prompt": [5, 86]}, InvalidRequest, "token 86"),
        ({"sampling": replace(GREEDY, temperature=-0.1)}, InvalidRequest, "temperature"),
        ({"sampling": replace(GREEDY, temperature=math.nan)}, InvalidRequest, "temperature"),
        ({"sampling": replace(GREEDY, temperature=math.inf)}, InvalidRequest, "temperature"),
        ({"sampling": replace(GREEDY, top_p=0.0)}, InvalidRequest, "top_p"),
        ({"sampling": replace(GREEDY, top_p=1.1)}, InvalidRequest, "top_p"),
        ({"sampling": replace(GREEDY, top_p=math.nan)}, InvalidRequest, "top_p"),
        ({"sampling": replace(GREEDY, top_k=-1)}, InvalidRequest, "top_k"),
        ({"sampling": replace(GREEDY, top_k=10**400)}, InvalidRequest, "top_k"),
        ({"sampling": replace(GREEDY, max_tokens=0)}, InvalidRequest, "max_tokens"),
        ({"sampling": replace(GREEDY, seed=1 << 64)}, InvalidRequest, "seed"),
        ({"sampling": replace(GREEDY, stop_token_ids=frozenset({-500}))}, InvalidRequest, "stop_token_ids"),
        ({"sampling": replace(GREEDY, stop_token_ids=frozenset({10**30}))}, InvalidRequest, "stop_token_ids"),
        ({"offset": 16}, InvalidRequest, "16 output tokens made"),
    ],
)
async def test_what_cannot_be_served_is_refused_at_once(
    zoo: Zoo, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with running(zoo.base, MemorySource()) as run:
        with pytest.raises(error, match=message):
            await run.generate(**{"prompt": PROMPT} | change)
        assert run.metric("requests_total", outcome=error.__name__) == 1


async def test_only_the_version_that_has_added_tokens_takes_them(zoo: Zoo) -> None:
    plain, odd = zoo.versions[0].version, zoo.versions[3].version
    async with running(zoo.base, MemorySource(*zoo.versions)) as run:
        with pytest.raises(InvalidRequest, match="0 to 149 at the most"):
            await run.generate([5, 150], plain)
        assert not run.engine.stats().resident, "that needs no delta"
        with pytest.raises(InvalidRequest, match="token 87 is not in the vocabulary of version"):
            await run.generate([5, 87], plain)
        assert len(await run.generate([5, 87], odd)) == GREEDY.max_tokens
        with pytest.raises(InvalidRequest, match="0 to 87"):
            await run.generate([5, 88], odd)


async def test_a_full_engine_sends_requests_away(zoo: Zoo) -> None:
    async with running(zoo.base, MemorySource(), max_running=2, max_waiting=1) as run:
        inside = [asyncio.create_task(run.generate(PROMPT, None, LONG)) for _ in range(3)]
        await until(lambda: run.engine.stats().running == 2)
        assert run.engine.stats().waiting == 1
        with pytest.raises(Overloaded, match="3 requests are in the engine already"):
            await run.generate(PROMPT)
        await asyncio.gather(*inside)
        assert len(await run.generate(PROMPT)) == GREEDY.max_tokens


async def test_broken_versions_fail_alone_and_leave_their_slots(zoo: Zoo, tied_zoo: Zoo) -> None:
    foreign = tied_zoo.versions[0]
    cut = replace(zoo.versions[1], blobs={b: data[:-7] for b, data in zoo.versions[1].blobs.items()})
    good = zoo.versions[0].version
    async with running(zoo.base, MemorySource(foreign, cut, zoo.versions[0]), slots=1) as run:
        results = await asyncio.gather(
            *(run.generate(PROMPT, v) for v in (foreign.version, good, cut.version, foreign.version, good)),
            return_exceptions=True,
        )
        assert [type(results[i]) for i in (0, 2, 3)] == [BaseMismatch, BlobCorrupt, BaseMismatch]
        assert results[1] == results[4] == zoo.oracles[good].greedy(PROMPT, GREEDY.max_tokens)
        assert not run.engine.stats().resident - {good}
        assert run.metric("load_failures_total", error="BlobCorrupt") == 1


async def test_the_first_chunk_says_where_the_delta_was(zoo: Zoo) -> None:
    async with running(zoo.base, MemorySource(*zoo.versions, tier="remote")) as run:

        async def tiers(version: str | None) -> list[str | None]:
            request = GenerateRequest("r", version, tuple(PROMPT), GREEDY)
            return [chunk.tier async for chunk in run.engine.generate(request)]

        cold, warm, base = [await tiers(v) for v in (zoo.versions[0].version, zoo.versions[0].version, None)]
    assert (cold[0], warm[0], base[0]) == ("remote", "device", "device")
    assert not any(cold[1:] + warm[1:] + base[1:])


async def test_a_load_does_not_hold_up_the_others(zoo: Zoo) -> None:
    source = slow_source(zoo)
    source.gate.set()
    cold, warm = zoo.versions[0].version, zoo.versions[1].version
    async with running(zoo.base, source) as run:
        await run.generate(PROMPT, warm)
        source.gate.clear()
        waiting = asyncio.create_task(run.generate(PROMPT, cold))
        await until(lambda: cold in run.engine.stats().loading)
        for version in (None, warm):
            assert await run.generate(PROMPT, version) == zoo.oracles[version].greedy(PROMPT, GREEDY.max_tokens)
        assert not waiting.done()
        source.gate.set()
        assert await waiting == zoo.oracles[cold].greedy(PROMPT, GREEDY.max_tokens)


async def test_copying_into_a_slot_does_not_hold_up_the_others(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = zoo.versions[0].version
    may_copy, copying = threading.Event(), threading.Event()
    async with running(zoo.base, MemorySource(*zoo.versions)) as run:
        slots = parts_of(run).core.slots
        load = slots.load

        def slow_load(slot: int, delta: HostDelta, usable: Callable[[], object]) -> None:
            copying.set()
            assert may_copy.wait(20)
            load(slot, delta, usable)

        monkeypatch.setattr(slots, "load", slow_load)
        waiting = asyncio.create_task(run.generate(PROMPT, cold))
        await until(copying.is_set)
        assert await run.generate(PROMPT) == zoo.oracles[None].greedy(PROMPT, GREEDY.max_tokens)
        assert cold not in run.engine.stats().resident
        may_copy.set()
        assert await waiting == zoo.oracles[cold].greedy(PROMPT, GREEDY.max_tokens)


async def test_a_load_that_takes_too_long_times_out(zoo: Zoo) -> None:
    source = slow_source(zoo)
    async with running(zoo.base, source, load_timeout_s=0.3) as run:
        with pytest.raises(LoadTimeout):
            await run.generate(PROMPT, zoo.versions[0].version)
        source.gate.set()
        assert len(await run.generate(PROMPT, zoo.versions[0].version)) == GREEDY.max_tokens


async def test_leaving_a_load_does_not_cancel_it_for_others(zoo: Zoo) -> None:
    source = slow_source(zoo)
    version = zoo.versions[0].version
    async with running(zoo.base, source) as run:
        first, second = (asyncio.create_task(run.generate(PROMPT, version)) for _ in range(2))
        await until(lambda: source.acquired)
        first.cancel()
        source.gate.set()
        assert len(await second) == GREEDY.max_tokens
        assert source.acquired == [version]
        assert first.cancelled()


async def test_leaving_a_request_ends_its_work(zoo: Zoo) -> None:
    async with running(zoo.base, MemorySource(*zoo.versions)) as run:
        for version in (None, zoo.versions[0].version):
            steps = run.metric("step_seconds_count")
            stream = run.engine.generate(GenerateRequest("leaver", version, tuple(PROMPT), LONG))
            await anext(stream)
            await stream.aclose()
            await until(lambda: run.engine.stats().kv_blocks_free == SETTINGS["kv_blocks"])
            assert run.metric("step_seconds_count") - steps < LONG.max_tokens / 2


async def test_one_request_id_may_be_used_again_while_the_first_ends(zoo: Zoo) -> None:
    async with running(zoo.base, MemorySource()) as run:
        outputs = await asyncio.gather(*(run.generate(PROMPT) for _ in range(4)))
    assert outputs == [outputs[0]] * 4


async def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(zoo: Zoo) -> None:
    version, other = zoo.versions[0].version, zoo.versions[1].version
    async with running(zoo.base, MemorySource(*zoo.versions)) as run:
        await run.generate(PROMPT, version)
        target = parts_of(run).core.slots.targets["model.layers.1.mlp.down_proj.weight"]
        assert isinstance(target, MatrixTarget)
        assert isinstance(target.base, torch.Tensor)
        slot, good = next((i, delta) for i, delta in enumerate(target.deltas) if delta is not None)
        target.deltas[slot] = PackedDelta("raw", (1, 1), {"values": target.base[:1, :1]})
        with pytest.raises(EngineError, match="the step failed"):
            await run.generate(PROMPT, version)
        target.deltas[slot] = good
        for name in (version, other, None):
            assert await run.generate(PROMPT, name) == zoo.oracles[name].greedy(PROMPT, GREEDY.max_tokens)
        assert run.engine.stats().kv_blocks_free == SETTINGS["kv_blocks"]


async def test_stopping_answers_everybody(zoo: Zoo) -> None:
    source = slow_source(zoo)
    async with running(zoo.base, MemorySource(*zoo.versions)) as other:
        run = unstarted(zoo, source)
        with pytest.raises(EngineStopped, match="call start"):
            await run.generate(PROMPT)
        await run.engine.start()
        await run.engine.start()
        tasks = [asyncio.create_task(run.generate(PROMPT, None, LONG)) for _ in range(4)]
        tasks += [asyncio.create_task(run.generate(PROMPT, version.version)) for version in zoo.versions]
        await until(lambda: run.engine.stats().running == 4)
        await run.engine.stop()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert [type(result) for result in results] == [EngineStopped] * 8
        with pytest.raises(EngineStopped):
            await run.generate(PROMPT)
        await run.engine.stop()
        assert not any(source.held.values())
        assert len(await other.generate(PROMPT)) == GREEDY.max_tokens


async def test_a_request_whose_structure_is_compiled_is_inside_and_answered_when_the_engine_stops(zoo: Zoo) -> None:
    compiled = asyncio.Event()

    async def make_matcher(version: str | None, structure: Structure) -> Matcher:
        await compiled.wait()
        return AnyToken()

    registry = CollectorRegistry()
    config = EngineConfig(**SETTINGS | {"max_running": 1, "max_waiting": 0})
    engine = AsyncEngine(config, zoo.base, MemorySource(), registry, make_matcher=make_matcher)
    await engine.start()
    run, sampling = RunningEngine(engine, registry), replace(GREEDY, structure=Structure("json"))
    task = asyncio.create_task(run.generate(PROMPT, None, sampling))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="1 requests are in the engine"):
        await run.generate(PROMPT)
    await engine.stop()
    compiled.set()
    with pytest.raises(EngineStopped):
        await asyncio.wait_for(task, 5)


async def test_stopped_while_it_starts(zoo: Zoo) -> None:
    run = unstarted(zoo, MemorySource())
    start = asyncio.create_task(run.engine.start())
    await asyncio.sleep(0)
    await run.engine.stop()
    with pytest.raises(EngineStopped):
        await start


async def test_a_device_that_fails_every_step_turns_the_health_check_red_and_everybody_is_answered(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unstarted(zoo, MemorySource(), max_running=2)
    await run.engine.start()

    def launch(batch: object) -> None:
        raise RuntimeError("CUDA error: out of luck")

    monkeypatch.setattr(parts_of(run).core.runner, "launch", launch)
    tasks = [asyncio.create_task(run.generate(PROMPT, None, LONG)) for _ in range(2 * MOST_FAILURES + 5)]
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    kinds = [type(result) for result in results]
    assert set(kinds) == {EngineError, EngineStopped}
    assert kinds.count(EngineError) <= 2 * MOST_FAILURES
    with pytest.raises(EngineStopped):
        await run.engine.check()
    await run.engine.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_when_the_loop_itself_breaks_nobody_hangs(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    run = unstarted(zoo, MemorySource())
    await run.engine.start()
    tasks = [asyncio.create_task(run.generate(PROMPT, None, LONG)) for _ in range(3)]
    await until(lambda: run.engine.stats().running == 3)
    monkeypatch.setattr(parts_of(run).core.scheduler, "schedule", lambda: 1 / 0)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert [type(result) for result in results] == [EngineStopped] * 3
    with pytest.raises(EngineStopped):
        await run.engine.check()
    await run.engine.stop()


async def test_random_requests_with_random_cancellations_leak_nothing(zoo: Zoo) -> None:
    dice = random.Random(7)
    source = MemorySource(*zoo.versions)
    outcomes = {"done": 0, "left": 0}

    async def one(run: RunningEngine, i: int) -> None:
        version = dice.choice(zoo.names)
        sampling = SamplingParams(max_tokens=dice.randint(1, 24), temperature=dice.choice([0.0, 1.0]), seed=i)
        task = asyncio.create_task(run.generate(random_prompt(i, dice.randint(1, 60)), version, sampling))
        if dice.random() < 0.4:
            await asyncio.sleep(dice.random() * 0.1)
            task.cancel()
        try:
            await task
            outcomes["done"] += 1
        except asyncio.CancelledError:
            outcomes["left"] += 1

    async with running(zoo.base, source, slots=2, kv_blocks=30, block_size=4, max_batch_tokens=48) as run:
        for start in range(0, 200, 40):
            await asyncio.gather(*(one(run, i) for i in range(start, start + 40)))
            await run.engine.check()
        await until(lambda: run.engine.stats().kv_blocks_free == 30)
        stats = run.engine.stats()
        assert (stats.running, stats.waiting, stats.loading) == (0, 0, frozenset())
        assert run.metric("preemptions_total") > 0
        assert run.metric("evictions_total") > 4
        prompt = random_prompt(3, 30)
        for version in zoo.names:
            assert await run.generate(prompt, version) == zoo.oracles[version].greedy(prompt, GREEDY.max_tokens)
    assert sum(outcomes.values()) == 200
    assert min(outcomes.values()) > 20
    assert not any(source.held.values())


def unstarted(zoo: Zoo, source: MemorySource, **settings: int) -> RunningEngine:
    registry = CollectorRegistry()
    return RunningEngine(AsyncEngine(EngineConfig(**SETTINGS | settings), zoo.base, source, registry), registry)


def parts_of(run: RunningEngine) -> Any:
    """The inside of a running engine, to break it."""
    return run.engine._parts
