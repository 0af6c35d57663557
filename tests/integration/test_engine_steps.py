"""The real engine one step ahead, with and without shared prefixes: the same tokens, and nothing is left over."""

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.errors import EngineStopped
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams
from tests.support.engines import GREEDY, SETTINGS, RunningEngine, random_prompt, running, serving
from tests.support.versions import MemorySource
from tests.support.zoo import Zoo

SMALL = {"kv_blocks": 36, "block_size": 4, "max_batch_tokens": 48}


def requests(zoo: Zoo, count: int) -> list[GenerateRequest]:
    """Greedy and drawn, with penalties, stop tokens and log-probabilities; half of them begin alike."""
    dice = random.Random(5)
    common = random_prompt(1, 22)
    made = []
    for i in range(count):
        sampling = SamplingParams(
            max_tokens=dice.randint(4, 40),
            temperature=dice.choice([0.0, 1.0]),
            seed=i,
            repetition_penalty=dice.choice([1.0, 1.0, 1.0, 1.2]),
            stop_token_ids=frozenset(dice.sample(range(80), dice.choice([0, 2]))),
            logprobs=dice.choice([None, None, 2]),
        )
        prompt = common * dice.randint(0, 1) + random_prompt(100 + i, dice.randint(1, 30))
        made.append(GenerateRequest(str(i), zoo.names[i % 5], tuple(prompt), sampling, priority=dice.randint(-1, 1)))
    return made


async def answer(run: RunningEngine, request: GenerateRequest) -> tuple[list[int], str | None]:
    tokens: list[int] = []
    reason = None
    async for chunk in run.engine.generate(request):
        tokens += chunk.tokens
        reason = chunk.finish_reason
    return tokens, reason


async def test_one_step_ahead_and_with_shared_prefixes_the_tokens_are_the_same(zoo: Zoo) -> None:
    asked = requests(zoo, 35)
    async with running(zoo.base, MemorySource(*zoo.versions), kv_prefix_cache=False) as run:
        alone = [await answer(run, request) for request in asked]
    for ahead in (False, True):
        for cached in (False, True):
            settings = SMALL | {"async_steps": ahead, "kv_prefix_cache": cached}
            async with running(zoo.base, MemorySource(*zoo.versions), **settings) as run:
                for version in zoo.names:
                    await run.generate([5], version)
                found = await asyncio.gather(*(answer(run, request) for request in asked))
                assert found == alone, settings
                assert run.metric("preemptions_total") > 0
                assert (run.metric("prefix_hit_tokens_total") > 0) == cached
                assert run.engine.stats().kv_blocks_free == SMALL["kv_blocks"]


@pytest.mark.parametrize("ahead", [False, True])
async def test_a_prompt_that_was_computed_before_is_not_computed_again(zoo: Zoo, ahead: bool) -> None:
    version, prompt = zoo.versions[1].version, random_prompt(3, 41)
    async with serving(zoo, async_steps=ahead, block_size=8) as run:
        first = await run.generate(prompt, version)
        rows = run.metric("step_rows_sum")
        assert await run.generate(prompt, version) == first == zoo.oracles[version].greedy(prompt, GREEDY.max_tokens)
        assert run.metric("step_rows_sum") - rows == 1 + GREEDY.max_tokens - 1, "40 tokens are in five blocks"
        assert run.metric("prefix_hit_tokens_total") == 40
        # A conversation that goes on shares what was generated too.
        more = [*prompt, *first, *random_prompt(4, 5)]
        assert await run.generate(more, version) == zoo.oracles[version].greedy(more, GREEDY.max_tokens)
        assert run.metric("prefix_hit_tokens_total") == 40 + 56


async def test_no_version_sees_what_another_one_computed(zoo: Zoo) -> None:
    prompt = random_prompt(3, 41)
    async with serving(zoo, block_size=8) as run:
        for version in zoo.names:
            assert await run.generate(prompt, version) == zoo.oracles[version].greedy(prompt, GREEDY.max_tokens)
        assert run.metric("prefix_hit_tokens_total") == 0


async def test_one_step_ahead_random_requests_with_random_cancellations_leak_nothing(zoo: Zoo) -> None:
    dice = random.Random(9)
    source = MemorySource(*zoo.versions)
    left = 0

    async def one(run: RunningEngine, request: GenerateRequest) -> None:
        nonlocal left
        task = asyncio.create_task(answer(run, request))
        if dice.random() < 0.4:
            await asyncio.sleep(dice.random() * 0.1)
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            left += 1

    async with running(zoo.base, source, slots=2, async_steps=True, **SMALL) as run:
        asked = requests(zoo, 150)
        for start in range(0, len(asked), 50):
            await asyncio.gather(*(one(run, request) for request in asked[start : start + 50]))
            await run.engine.check()
        # Whoever left is told so by the step that had it.
        await run.generate(random_prompt(0, 5), None, replace(GREEDY, max_tokens=2))
        stats = run.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_free) == (0, 0, SMALL["kv_blocks"])
        assert run.metric("preemptions_total") > 0
        assert run.metric("evictions_total") > 4
    assert left > 20
    assert not any(source.held.values())


async def test_a_lost_device_stops_the_engine_and_its_health_check_says_so(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsyncEngine(EngineConfig(**SETTINGS), zoo.base, MemorySource(), CollectorRegistry())
    await engine.start()
    streams = [engine.generate(GenerateRequest("r", None, (5, 6), replace(GREEDY, max_tokens=200))) for _ in range(3)]
    for stream in streams:
        await anext(stream)

    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    parts: Any = engine._parts
    monkeypatch.setattr(parts.core.runner, "launch", lost)
    monkeypatch.setattr(parts.core.runner, "synchronize", lost)
    for stream in streams:
        with pytest.raises(EngineStopped):  # another replica goes on with it
            async for _ in stream:
                pass
    with pytest.raises(EngineStopped):
        await engine.check()
    await engine.stop()
