"""Where the device's time of a step goes."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.engine_runs import batch
from deltazip_ray.engine.async_engine import AsyncEngine


async def profile(engine: AsyncEngine, requests: int, prompt: int, versions: int) -> dict[str, Any]:
    """Milliseconds of device time of a decode step, by kind of kernel, and one step's launches."""
    running = asyncio.ensure_future(batch(engine, requests, prompt, 180, versions, 7))
    await asyncio.sleep(0.4 + requests * prompt / 30_000)  # the prompts are over
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        await asyncio.sleep(0.25)
    await running
    launches = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return step_times(sorted(launches, key=lambda event: event.time_range.start))


def step_times(launches: Sequence[Any]) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, and one whole step as it ran.

    Where launches overlap, time counts for the one that ends first: others only wait for it.
    """
    heads = [i for i, event in enumerate(launches) if "MaxOps" in event.name]
    steps = len(heads) - 1
    if steps < 1:
        return {"steps": 0}
    inside = sorted(launches[heads[0] + 1 : heads[-1] + 1], key=lambda event: event.time_range.end)
    totals: dict[str, float] = {}
    ended = launches[heads[0]].time_range.end
    for event in inside:
        kind = kernel_kind(event.name)
        spent = event.time_range.end - max(event.time_range.start, ended)
        totals[kind] = totals.get(kind, 0.0) + max(0.0, spent) / 1e3 / steps
        ended = max(ended, event.time_range.end)
    span = (ended - launches[heads[0]].time_range.end) / 1e3 / steps
    one = launches[heads[-2] + 1 : heads[-1] + 1]
    began = one[0].time_range.start
    trace = [(e.name[:60], e.time_range.start - began, e.time_range.elapsed_us()) for e in one]
    return totals | {"gaps": span - sum(totals.values()), "whole step": span, "steps": steps, "trace": trace}


def kernel_kind(name: str) -> str:
    """Which part of a step a kernel belongs to."""
    kinds = {
        "attention": ("Decode", "Prefill", "attention", "MergeState", "rope", "flashinfer"),
        "delta": ("grouped", "raw", "shrink", "expand", "write_items", "merge"),
        "norms and activation": ("norm", "gated", "quantize"),
        "base GEMM": ("skinny", "nvjet", "gemm", "cutlass", "splitK", "cublas"),
    }
    return next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "rest")
