"""What a scrape of an engine's registry says after known work."""

from prometheus_client import CollectorRegistry, generate_latest

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from tests.support.engines import GREEDY, random_prompt, running, serving
from tests.support.versions import MemorySource
from tests.support.zoo import Zoo


async def test_the_numbers_are_those_of_the_work(zoo: Zoo) -> None:
    version = zoo.versions[0].version
    async with serving(zoo, slots=1) as run:
        for asked in (None, version, version, zoo.versions[1].version):
            await run.generate(random_prompt(0, 10), asked)
        for name, value in {
            "prompt_tokens_total": 40,
            "output_tokens_total": 4 * GREEDY.max_tokens,
            "step_versions_sum": 4 * GREEDY.max_tokens,
            "step_rows_sum": 4 * (10 + GREEDY.max_tokens - 1),
            "resident_versions": 1,
            "loading_versions": 0,
            "slots": 1,
            "running_requests": 0,
            "waiting_requests": 0,
            "kv_blocks": 256,
            "kv_blocks_used": 0,
            "evictions_total": 1,
            "preemptions_total": 0,
        }.items():
            assert run.metric(name) == value, name
        assert run.metric("requests_total", outcome="length") == 4
        assert run.metric("first_token_seconds_count", tier="remote") == 2
        assert run.metric("first_token_seconds_count", tier="device") == 2
        assert run.metric("load_seconds_count", tier="remote") == 2
        assert run.metric("step_seconds_count") == run.metric("step_rows_count") == 4 * GREEDY.max_tokens


async def test_a_scrape_before_the_start_and_after_the_stop(zoo: Zoo) -> None:
    registry = CollectorRegistry()
    AsyncEngine(EngineConfig(slots=3), zoo.base, MemorySource(), registry)
    assert b"deltazip_engine_slots 3.0" in generate_latest(registry)
    async with running(zoo.base, MemorySource()) as run:
        await run.generate([5])
    assert b'deltazip_engine_requests_total{outcome="length"} 1.0' in generate_latest(run.registry)
