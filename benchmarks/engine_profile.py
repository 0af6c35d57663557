"""Where the device's time of a step goes."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from benchmarks.engine_runs import batch, jobs
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.scheduler.request import GenerateRequest

_DEVICE = (torch.profiler.ProfilerActivity.CUDA,)
_BEFORE = 70
"""Tokens that the last request has drawn when a trace begins: in its middle, each has about 90."""


async def profile(engine: AsyncEngine, requests: int, prompt: int, versions: int) -> dict[str, Any]:
    """Milliseconds of device time of a decode step, by kind of kernel, one step's launches, and ``context``: the tokens
    that a request has in the middle of the trace."""
    with torch.profiler.profile(activities=_DEVICE):
        pass  # the first takes long to begin
    drawn = [0] * requests
    begun = asyncio.Event()

    async def one(i: int, request: GenerateRequest) -> None:
        async for chunk in engine.generate(request):
            drawn[i] += len(chunk.tokens)
            if drawn[-1] >= _BEFORE:
                begun.set()

    running = asyncio.gather(*map(one, range(requests), jobs(engine, requests, prompt, 180, versions, 7)))
    await begun.wait()
    with torch.profiler.profile(activities=_DEVICE) as trace:
        await asyncio.sleep(0.25)
        tokens = prompt + sum(drawn) / requests
    await running
    found = step_times(_launches(trace))
    return found | {"context": tokens - found["steps"] / 2}


async def profile_prompts(engine: AsyncEngine, versions: int) -> dict[str, Any]:
    """The same of the steps that have prompts, of 512 requests at once: 256 tokens each, and then up to 224 decodes."""
    await batch(engine, 512, 256, 2, versions, 9)
    with torch.profiler.profile(activities=_DEVICE) as trace:
        await batch(engine, 512, 256, 40, versions, 8)
    return step_times(_launches(trace), having="Prefill")


def _launches(trace: torch.profiler.profile) -> list[Any]:
    launches = [event for event in trace.events() if event.device_type.name == "CUDA"]
    return sorted(launches, key=lambda event: event.time_range.start)


def step_times(launches: Sequence[Any], having: str = "") -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, and one whole step as it ran; of steps ``having`` a kernel named so.

    Where launches overlap, time counts for the one that ends first: others only wait for it.
    """
    heads = [i for i, event in enumerate(launches) if "pick_tokens" in event.name]
    steps = [launches[head : end + 1] for head, end in pairwise(heads)]  # with the end of the step before
    steps = [step for step in steps if any(having in event.name for event in step)]
    if not steps:
        return {"steps": 0}
    totals: Counter[str] = Counter()
    for head, *inside in steps:
        ended = head.time_range.end
        for event in sorted(inside, key=lambda event: event.time_range.end):
            spent = event.time_range.end - max(event.time_range.start, ended)
            totals[kernel_kind(event.name)] += max(0.0, spent)
            ended = max(ended, event.time_range.end)
        totals["whole step"] += ended - head.time_range.end
    found = {kind: spent / 1e3 / len(steps) for kind, spent in totals.items()}
    gaps = 2 * found["whole step"] - sum(found.values())
    one = steps[-1][1:]
    began = one[0].time_range.start
    traced = [(e.name[:60], e.time_range.start - began, e.time_range.elapsed_us()) for e in one]
    return found | {"gaps": gaps, "steps": len(steps), "trace": traced}


def kernel_kind(name: str) -> str:
    """Which part of a step a kernel belongs to."""
    kinds = {
        "base with delta": ("fused",),
        "attention": ("Decode", "Prefill", "attention", "MergeState", "rope", "flashinfer"),
        "delta": ("grouped", "raw", "shrink", "expand", "write_items", "merge"),
        "norms and activation": ("norm", "gated", "quantize"),
        "base GEMM": ("skinny", "nvjet", "gemm", "cutlass", "splitK", "cublas"),
    }
    return next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "rest")
