"""Sampling through the engine: seeds, and what ends an output."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams, TokenLogprobs
from tests.support.engines import GREEDY, RunningEngine, random_prompt, running
from tests.support.versions import MemorySource
from tests.support.zoo import Zoo


async def test_a_seed_gives_the_same_tokens_alone_in_a_crowd_and_after_a_move(zoo: Zoo) -> None:
    sampling = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=11)
    prompt, version = random_prompt(1, 14), zoo.versions[0].version
    async with running(zoo.base, MemorySource(*zoo.versions)) as run:
        alone = await run.generate(prompt, version, sampling)
        crowd = [run.generate(random_prompt(i, 9 + i), zoo.names[i % 5], replace(sampling, seed=i)) for i in range(12)]
        together, *_ = await asyncio.gather(run.generate(prompt, version, sampling), *crowd)
        moved = await run.generate([*prompt, *alone[:10]], version, sampling, offset=10)
        other = await run.generate(prompt, version, replace(sampling, seed=12))
    assert len(alone) == 24
    assert together == alone
    assert alone[:10] + moved == alone
    assert other != alone


async def test_stop_tokens_end_the_output_and_are_not_returned(zoo: Zoo) -> None:
    prompt = random_prompt(2, 10)
    greedy = SamplingParams(max_tokens=16, temperature=0.0)
    async with running(zoo.base, MemorySource()) as run:
        free = await run.generate(prompt, None, greedy)
        stop = free[5]
        stopped = await run.generate(prompt, None, replace(greedy, stop_token_ids=frozenset({stop})))
        ignored = await run.generate(prompt, None, replace(greedy, stop_token_ids=frozenset({stop}), ignore_eos=True))
        assert run.metric("requests_total", outcome="stop") == 1
        assert run.metric("requests_total", outcome="length") == 2
    assert stopped == free[: free.index(stop)]
    assert ignored == free


async def test_steps_ahead_change_nothing_for_draws_that_look_back(zoo: Zoo) -> None:
    free = SamplingParams(max_tokens=20, temperature=0.9, seed=5)
    kinds = [
        free,
        replace(free, repetition_penalty=1.5),
        replace(free, presence_penalty=1.0, frequency_penalty=0.5),
        replace(free, temperature=0.0, repetition_penalty=2.0),
        replace(free, logit_bias=((40, 3.0),), min_tokens=8, stop_token_ids=frozenset({40})),
        replace(free, min_p=0.2, top_k=30),
    ]

    async def outputs(*, ahead: bool) -> list[list[int]]:
        # Few blocks, so that some are preempted and computed again.
        async with running(zoo.base, MemorySource(*zoo.versions), async_steps=ahead, kv_blocks=12) as run:
            requests = [run.generate(random_prompt(i, 12), zoo.names[i % 5], kinds[i % len(kinds)]) for i in range(12)]
            return await asyncio.gather(*requests)

    assert await outputs(ahead=True) == await outputs(ahead=False)


def whole_prompt(zoo: Zoo, version: str | None, prompt: list[int]) -> list[TokenLogprobs]:
    """What transformers say of each token but the first: its log-probability, the three best, its rank."""
    logprobs = zoo.oracles[version].logits(prompt)[:-1].log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])
    best = logprobs.topk(3)
    ranks = (logprobs > chosen).sum(-1) + 1
    rows = zip(chosen[:, 0].tolist(), best.indices.tolist(), best.values.tolist(), ranks.tolist(), strict=True)
    return [TokenLogprobs(c, tuple(zip(ids, values, strict=True)), rank) for c, ids, values, rank in rows]


async def scored(run: RunningEngine, prompt: list[int], version: str | None) -> list[TokenLogprobs]:
    sampling = replace(GREEDY, max_tokens=3, prompt_logprobs=3)
    request = GenerateRequest("scored", version, tuple(prompt), sampling)
    chunks = [chunk async for chunk in run.engine.generate(request)]
    assert not any(chunk.prompt_logprobs for chunk in chunks[1:])
    assert [token for chunk in chunks for token in chunk.tokens] == await run.generate(prompt, version, sampling)
    return list(chunks[0].prompt_logprobs)


@pytest.mark.parametrize("ahead", [False, True])
async def test_logprobs_of_prompts_are_those_of_transformers(zoo: Zoo, ahead: bool) -> None:
    """In chunks, in pieces, beside others, preempted, and though the prefix cache has the prompt."""
    prompts = [random_prompt(i, 40 + i) for i in range(6)]
    small: dict[str, Any] = {"max_batch_tokens": 32, "kv_blocks": 12, "max_running": 8, "async_steps": ahead}
    async with running(zoo.base, MemorySource(*zoo.versions), **small) as run:
        versions = [zoo.names[i % 5] for i in range(6)]
        await run.generate(prompts[0], versions[0])
        long = replace(GREEDY, max_tokens=90)
        busy = [asyncio.create_task(run.generate(random_prompt(9, 30), version, long)) for version in versions[:2]]
        found = await asyncio.gather(*(scored(run, p, v) for p, v in zip(prompts, versions, strict=True)))
        await asyncio.gather(*busy)
        assert run.engine.stats().preemptions > 0
        assert (await scored(run, [5], None)) == []
    for prompt, version, told in zip(prompts, versions, found, strict=True):
        expected = whole_prompt(zoo, version, prompt)
        assert [one.rank for one in told] == [one.rank for one in expected]
        assert [one.chosen for one in told] == pytest.approx([one.chosen for one in expected], abs=1e-4)
        assert [[token for token, _ in one.best] for one in told] == [[t for t, _ in one.best] for one in expected]
