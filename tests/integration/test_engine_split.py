"""Slots are lent to the KV cache and come back while requests run, are cancelled and wait for versions."""

import asyncio
import random
from dataclasses import replace

import pytest

from deltazip_ray.engine.split import Split
from deltazip_ray.errors import EngineError
from tests.support.engines import GREEDY, RunningEngine, random_prompt, running
from tests.support.splits import make_restless
from tests.support.versions import MemorySource
from tests.support.zoo import Zoo

OWN, SLOTS = 24, 3
SETTINGS = {"slots_min": 1, "kv_blocks": OWN, "block_size": 4, "max_model_len": 90, "max_batch_tokens": 64}
CALM, CROWDED = 2, 5
"""Of the zoo's names, those that are asked for in turns: fewer than slots, and more."""


@pytest.mark.parametrize("ahead", [False, True])
async def test_outputs_stay_as_they_are_and_nothing_leaks(
    zoo: Zoo, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = make_restless(monkeypatch)
    source, dice = MemorySource(*zoo.versions), random.Random(5)
    prompts = [random_prompt(i, length) for i, length in enumerate((50, 31, 12, 4))]
    sampling = replace(GREEDY, max_tokens=12)
    expected = {(name, i): zoo.oracles[name].greedy(p, 12) for name in zoo.names for i, p in enumerate(prompts)}
    moves: set[int] = set()

    async def one(run: RunningEngine, names: int) -> None:
        version, i = dice.choice(zoo.names[:names]), dice.randrange(len(prompts))
        task = asyncio.create_task(run.generate(prompts[i], version, sampling))
        if dice.random() < 0.3:
            await asyncio.sleep(dice.random() * 0.1)
            task.cancel()
        try:
            assert await task == expected[version, i]
        except asyncio.CancelledError:
            return
        moves.add(run.engine.stats().kv_blocks)

    async with running(zoo.base, source, async_steps=ahead, slots=SLOTS, **SETTINGS) as run:
        for wave in range(4):
            await asyncio.gather(*(one(run, CROWDED if wave % 2 else CALM) for _ in range(30)))
            await run.engine.check()
        async with asyncio.timeout(10):
            while run.engine.stats().slots < SLOTS:  # noqa: ASYNC110 - they come back when the cache is not short
                await asyncio.sleep(0.01)
        await run.generate(prompts[3])
        stats = run.engine.stats()
        assert (stats.kv_blocks, stats.kv_blocks_free, stats.running, stats.waiting) == (OWN, OWN, 0, 0)
    assert len(lent) > 2
    assert len(moves) > 1
    assert not any(source.held.values())


async def test_an_engine_whose_split_has_broken_is_replaced(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(split: Split) -> None:
        raise IndexError("a bug")

    monkeypatch.setattr(Split, "look", breaks)
    with pytest.raises(EngineError, match="no longer come back") as caught:
        async with running(zoo.base, MemorySource(), slots=SLOTS, **SETTINGS):
            await asyncio.sleep(0.1)
    assert isinstance(caught.value.__cause__, IndexError)
