"""Runs of an engine that are measured. See ``benchmarks.engine`` for what the figures mean."""

import asyncio
import random
import statistics
import threading
import time
from typing import Any

from prometheus_client import CollectorRegistry

from benchmarks.gpu_clocks import clocks
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

LONG, SHORT = 136, 8
GROWTH_PROMPT, GROWTH_OUTPUT = 256, 80


def jobs(
    engine: AsyncEngine, requests: int, prompt: int, output: int, versions: int, seed: int, *, zipf: bool = False
) -> list[GenerateRequest]:
    """Random greedy requests of versions in turn, or drawn by Zipf's law; of the base when there are none."""
    rng = random.Random(seed)
    sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    names: list[str | None] = [f"{i:064x}" for i in range(versions)]
    names = names or [None]
    if zipf:
        names = rng.choices(names, [1 / (1 + rank) for rank in range(versions)], k=requests)
    return [
        GenerateRequest(str(i), names[i % len(names)], tuple(rng.choices(range(engine.vocab_size), k=prompt)), sampling)
        for i in range(requests)
    ]


async def batch(engine: AsyncEngine, requests: int, prompt: int, output: int, versions: int, seed: int) -> float:
    """Seconds until all of ``requests`` random requests are done."""
    wanted = jobs(engine, requests, prompt, output, versions, seed)

    async def one(request: GenerateRequest) -> int:
        return sum([len(chunk.tokens) async for chunk in engine.generate(request)])

    began = time.perf_counter()
    counts = await asyncio.gather(*map(one, wanted))
    elapsed = time.perf_counter() - began
    if set(counts) != {output}:
        raise SystemExit(f"requests ended early: {sorted(set(counts))} tokens instead of {output}")
    return elapsed


async def step(engine: AsyncEngine, requests: int, versions: int, runs: int) -> dict[str, Any]:
    """Milliseconds of a decode step, by the difference of long and short runs."""
    samples = []
    found: dict[str, Any] = {}
    await batch(engine, requests, 512, SHORT, versions, 0)
    with clocks(found):
        for seed in range(1, runs + 1):
            long = await batch(engine, requests, 512, LONG, versions, 2 * seed)
            short = await batch(engine, requests, 512, SHORT, versions, 2 * seed + 1)
            samples.append(1e3 * (long - short) / (LONG - SHORT))
    return found | {"requests": requests, "ms": statistics.median(samples), "samples": samples}


async def decodes(
    engine: AsyncEngine, registry: CollectorRegistry, requests: int, versions: int, *, zipf: bool = False
) -> dict[str, Any]:
    """Milliseconds of the steps in which all of ``requests`` decode: the mean of one run, by the engine's clock; and
    the CPU time of the process's threads for each of them."""
    wanted = jobs(engine, requests, GROWTH_PROMPT, GROWTH_OUTPUT, versions, requests, zipf=zipf)
    marks: list[tuple[float, int, dict[str, float]]] = []
    begun = 0

    async def one(request: GenerateRequest) -> None:
        nonlocal begun
        chunks = engine.generate(request)
        await anext(chunks)
        begun += 1
        if begun == requests:
            marks.append((*steps(registry), cpu_seconds()))
        async for chunk in chunks:
            if chunk.finish_reason is not None and len(marks) == 1:
                marks.append((*steps(registry), cpu_seconds()))

    await asyncio.gather(*map(one, wanted))
    (since, before, spent), (until, after, spent_then) = marks
    count, found = after - before, len({request.version for request in wanted} - {None})
    host_ms = {name: 1e3 * (seconds - spent[name]) / count for name, seconds in spent_then.items()}
    return {
        "requests": requests,
        "versions": found,
        "ms": 1e3 * (until - since) / count,
        "host_ms": host_ms,
        "steps": count,
    }


async def saturated(engine: AsyncEngine, registry: CollectorRegistry, versions: int, runs: int) -> dict[str, Any]:
    """Output tokens a second; and the CPU time of threads for each step meanwhile, those with prompts among them."""
    await batch(engine, 512, 256, 4, versions, 99)
    spent_before, (_, before) = cpu_seconds(), steps(registry)
    found: dict[str, Any] = {}
    with clocks(found):
        samples = [512 * 128 / await batch(engine, 512, 256, 128, versions, 100 + seed) for seed in range(runs)]
    count = steps(registry)[1] - before
    host_ms = {name: 1e3 * (seconds - spent_before[name]) / count for name, seconds in cpu_seconds().items()}
    found |= {"tokens_per_s": statistics.median(samples), "samples": samples, "host_ms": host_ms, "steps": count}
    return found


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far of the thread that steps, of this one (event loop and clients), and of all others."""
    thread = next(thread for thread in threading.enumerate() if thread.name == "deltazip-step")
    steps = time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    here = time.thread_time()
    return {"steps": steps, "event loop": here, "others": time.process_time() - steps - here}


def steps(registry: CollectorRegistry) -> tuple[float, int]:
    """Seconds and number of all steps so far."""
    seconds, count = (registry.get_sample_value(f"deltazip_engine_step_seconds_{what}") for what in ("sum", "count"))
    return seconds or 0.0, int(count or 0)
