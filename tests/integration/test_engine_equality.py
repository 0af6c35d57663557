"""Greedy tokens of the engine against transformers on the merged weights, with versions sharing batches."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from deltazip_kernels import CODECS, LOW_RANK
from deltazip_ray.scheduler import admission, batch
from deltazip_ray.scheduler.batch import Batch, Chunk
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams
from tests.support.engines import GREEDY, RunningEngine, random_prompt, running, serving
from tests.support.oracle import Oracle
from tests.support.versions import MemorySource, build_version
from tests.support.zoo import Zoo


async def mismatches(run: RunningEngine, zoo: Zoo, count: int, *, shortest: int = 5, longest: int = 40) -> list[int]:
    """Of ``count`` requests at once, one of each version after the other: those that the oracle answers otherwise."""
    versions = [zoo.names[i % len(zoo.names)] for i in range(count)]
    prompts = [random_prompt(i, shortest + (7 * i) % (longest - shortest)) for i in range(count)]
    outputs = await asyncio.gather(*map(run.generate, prompts, versions))
    expected = [zoo.oracles[v].greedy(p, GREEDY.max_tokens) for v, p in zip(versions, prompts, strict=True)]
    return [i for i in range(count) if outputs[i] != expected[i]]


async def warm_up(run: RunningEngine, zoo: Zoo) -> None:
    """Bring all versions to the device, so that requests start in the order in which they come."""
    await asyncio.gather(*(run.generate([5], version) for version in zoo.names))


@pytest.mark.parametrize("fixture", ["zoo", "tied_zoo"])
async def test_versions_that_share_batches_get_the_tokens_of_their_merged_weights(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    zoo: Zoo = request.getfixturevalue(fixture)
    async with serving(zoo) as run:
        await warm_up(run, zoo)
        assert await mismatches(run, zoo, 20) == []
        assert run.steps_with(5) >= 5
        assert run.metric("step_rows_count") - run.metric("step_rows_bucket", le="8.0") >= 5


def test_the_versions_differ_from_the_base_and_from_one_another(zoo: Zoo) -> None:
    prompt = random_prompt(0, 12)
    outputs = {tuple(oracle.greedy(prompt, GREEDY.max_tokens)) for oracle in zoo.oracles.values()}
    assert len(outputs) == len(zoo.oracles)


async def test_prompts_in_small_chunks(zoo: Zoo) -> None:
    async with serving(zoo, max_batch_tokens=12, block_size=4) as run:
        await warm_up(run, zoo)
        assert await mismatches(run, zoo, 15, shortest=30, longest=90) == []
        assert run.steps_with(3) > 0


async def test_prompts_behind_decodes_in_whole_tiles(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in large steps: a version has decodes, and prompts behind those of others."""
    twice = 0

    def noted(chunks: Sequence[Chunk]) -> Batch:
        nonlocal twice
        made = of(chunks)
        slots = made.segments()[1]
        twice += len(slots) > len(set(slots))
        return made

    of = Batch.of
    monkeypatch.setattr(Batch, "of", noted)
    for module in (batch, admission):
        monkeypatch.setattr(module, "TILE_ROWS", 8)
    async with serving(zoo, max_batch_tokens=48, block_size=4) as run:
        await warm_up(run, zoo)
        assert await mismatches(run, zoo, 15, shortest=10, longest=90) == []
    assert twice


async def test_every_codec_in_one_batch(zoo: Zoo, tmp_path: Path) -> None:
    codecs = (*CODECS, LOW_RANK)
    raw = {LOW_RANK: "embed_tokens|lm_head"}  # an adapter has products only
    built = {c: build_version(zoo.base, zoo.versions[0].finetune, c, raw=raw.get(c, "$never")) for c in codecs}
    async with running(zoo.base, MemorySource(*built.values()), slots=len(codecs)) as run:
        prompts = [random_prompt(i, 10 + i) for i in range(len(codecs))]
        outputs = await asyncio.gather(
            *(run.generate(prompt, version.version) for prompt, version in zip(prompts, built.values(), strict=True))
        )
    for codec, prompt, output in zip(codecs, prompts, outputs, strict=True):
        oracle = Oracle(built[codec].write_merged(tmp_path / codec))
        assert output == oracle.greedy(prompt, GREEDY.max_tokens), codec


async def test_a_request_may_fill_the_context(zoo: Zoo) -> None:
    prompt = random_prompt(2, 64 - GREEDY.max_tokens)
    version = zoo.versions[1].version
    async with serving(zoo, max_model_len=64, block_size=16, kv_blocks=4) as run:
        assert await run.generate(prompt, version) == zoo.oracles[version].greedy(prompt, GREEDY.max_tokens)


async def test_evicted_and_loaded_again(zoo: Zoo) -> None:
    # Neither the slots nor the arena hold all versions, so that these come from the store again and again.
    largest = max(version.manifest.bytes_artifact for version in zoo.versions)
    async with serving(zoo, slots=2, arena_bytes=2 * largest + (64 << 10)) as run:
        for _ in range(3):
            assert await mismatches(run, zoo, 10) == []
        assert run.metric("evictions_total") >= 6, "two of the four leave in each round"
        assert run.metric("load_seconds_count", tier="remote") >= 6
        assert len(run.engine.stats().resident) == 2


async def test_weights_that_a_version_leaves_alone_are_the_bases(zoo: Zoo, tmp_path: Path) -> None:
    full, part = zoo.versions[3], zoo.versions[0].without(r"^lm_head|^model\.norm|layers\.0")
    oracle = Oracle(part.write_merged(tmp_path))
    prompt = random_prompt(1, 20)
    async with running(zoo.base, MemorySource(full, part), slots=1) as run:
        for _ in range(2):
            await run.generate(prompt, full.version)
            assert await run.generate(prompt, part.version) == oracle.greedy(prompt, GREEDY.max_tokens)


async def test_kv_preemption(zoo: Zoo) -> None:
    async with serving(zoo, block_size=4, kv_blocks=40) as run:
        assert await mismatches(run, zoo, 20, shortest=8, longest=32) == []
        assert run.metric("preemptions_total") > 0


async def test_cancellation_in_the_middle_leaves_the_others_alone(zoo: Zoo) -> None:
    async with serving(zoo) as run:

        async def leave_after_two(version: str | None) -> None:
            sampling = SamplingParams(max_tokens=200, temperature=0.0)
            stream = run.engine.generate(GenerateRequest("leaver", version, tuple(random_prompt(99, 10)), sampling))
            seen = 0
            async for chunk in stream:
                seen += len(chunk.tokens)
                if seen >= 2:
                    break
            await stream.aclose()

        wrong, *_ = await asyncio.gather(mismatches(run, zoo, 15), *map(leave_after_two, zoo.names))
        assert wrong == []
        assert run.metric("requests_total", outcome="aborted") == len(zoo.names)


async def test_an_added_token_can_be_read_and_written(zoo: Zoo) -> None:
    odd = zoo.versions[3]
    added = odd.manifest.base.vocab_size
    prompt = [*random_prompt(5, 6), added, added + 1, 7]
    async with serving(zoo) as run:
        tokens, *_ = await asyncio.gather(
            run.generate(prompt, odd.version), *(run.generate(random_prompt(i, 9), zoo.names[i]) for i in range(4))
        )
        assert tokens == zoo.oracles[odd.version].greedy(prompt, GREEDY.max_tokens)
        # Drawn from nearly uniform logits, added tokens come for the version that has them and for nobody else.
        hot = SamplingParams(max_tokens=200, temperature=50.0, seed=1)
        mine, other = await asyncio.gather(
            run.generate([5], odd.version, hot), run.generate([5], zoo.versions[0].version, hot)
        )
        assert {added, added + 1} <= set(mine)
        assert max(other) < added
