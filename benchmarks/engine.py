"""``python -m benchmarks.engine --json FILE``: the engine on one GPU, in process.

``step``: the time of N requests of 512 prompt and 136 output tokens, less that of the same with 8, over 128.
``saturated``: output tokens a second of 512 requests at once, 256 prompt and 128 output tokens, at most 256 running.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import triton
from prometheus_client import CollectorRegistry

from benchmarks.engine_model import RandomVersions, decoder_shape, in_arena, random_delta, started
from deltazip_kernels.bench.__main__ import commit
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.models.decoder_config import DecoderConfig
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

LONG, SHORT = 136, 8


def variant(index: int, count: int) -> str | None:
    """Versions in turn; the base when there are none."""
    return f"{index % count:064x}" if count else None


async def batch(engine: AsyncEngine, requests: int, prompt: int, output: int, versions: int, seed: int) -> float:
    """Seconds until all of ``requests`` random requests are done."""
    rng = random.Random(seed)
    vocab = engine.vocab_size
    sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    jobs = [
        GenerateRequest(str(i), variant(i, versions), tuple(rng.choices(range(vocab), k=prompt)), sampling)
        for i in range(requests)
    ]

    async def one(request: GenerateRequest) -> int:
        return sum([len(chunk.tokens) async for chunk in engine.generate(request)])

    began = time.perf_counter()
    counts = await asyncio.gather(*map(one, jobs))
    elapsed = time.perf_counter() - began
    if set(counts) != {output}:
        raise SystemExit(f"requests ended early: {sorted(set(counts))} tokens instead of {output}")
    return elapsed


async def step(engine: AsyncEngine, requests: int, versions: int, runs: int) -> dict[str, Any]:
    """Milliseconds of a decode step, by the difference of long and short runs."""
    samples = []
    for seed in range(runs + 1):
        long = await batch(engine, requests, 512, LONG, versions, 2 * seed)
        short = await batch(engine, requests, 512, SHORT, versions, 2 * seed + 1)
        samples.append(1e3 * (long - short) / (LONG - SHORT))
    return {"requests": requests, "ms": statistics.median(samples[1:]), "samples": samples[1:]}


async def saturated(engine: AsyncEngine, registry: CollectorRegistry, versions: int, runs: int) -> dict[str, Any]:
    """Output tokens a second; and the CPU time that threads took for each step meanwhile."""
    await batch(engine, 512, 256, 4, versions, 99)
    before, steps = thread_seconds(), step_count(registry)
    samples = [512 * 128 / await batch(engine, 512, 256, 128, versions, 100 + seed) for seed in range(runs)]
    steps = step_count(registry) - steps
    spent = sorted((after - before.get(thread, 0.0) for thread, after in thread_seconds().items()), reverse=True)
    host = [1e3 * seconds / steps for seconds in spent[:3]]
    return {"tokens_per_s": statistics.median(samples), "samples": samples, "host_ms_per_step": host, "steps": steps}


def thread_seconds() -> dict[int, float]:
    """CPU seconds of each thread so far."""
    return {thread.id: thread.user_time + thread.system_time for thread in psutil.Process().threads()}


def step_count(registry: CollectorRegistry) -> int:
    """Steps so far."""
    return int(registry.get_sample_value("deltazip_engine_step_seconds_count") or 0)


async def profile(engine: AsyncEngine, requests: int, versions: int) -> dict[str, Any]:
    """Milliseconds of device time of a step, by kind of kernel, over a run of decodes."""
    running = asyncio.ensure_future(batch(engine, requests, 512, 400, versions, 7))
    await asyncio.sleep(1.2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        await asyncio.sleep(0.4)
    await running
    kernels = sorted(
        (event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA),
        key=lambda event: event.time_range.start,
    )
    return step_times(kernels)


async def prefill(engine: AsyncEngine, versions: int, runs: int) -> dict[str, Any]:
    """Prompt tokens a second, and the device time of a run by kind of kernel and by kernel."""
    samples = [64 * 512 / await batch(engine, 64, 512, 1, versions, 300 + seed) for seed in range(runs + 1)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        await batch(engine, 64, 512, 1, versions, 400)
    totals: dict[str, float] = {}
    for event in trace.key_averages():
        kind = kernel_kind(event.key)
        totals[kind] = totals.get(kind, 0.0) + event.self_device_time_total / 1e3
    top = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)[:16]
    kernels = [(event.key[:60], event.count, event.self_device_time_total / 1e3) for event in top]
    return {"tokens_per_s": statistics.median(samples[1:]), "samples": samples[1:]} | totals | {"kernels": kernels}


def step_times(kernels: Sequence[Any]) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, and one whole step as it ran."""
    heads = [i for i, event in enumerate(kernels) if "MaxOps" in event.name]
    steps = len(heads) - 1
    if steps < 1:
        return {"steps": 0}
    inside = kernels[heads[0] + 1 : heads[-1] + 1]
    totals: dict[str, float] = {}
    for event in inside:
        kind = kernel_kind(event.name)
        totals[kind] = totals.get(kind, 0.0) + event.time_range.elapsed_us() / 1e3 / steps
    span = (kernels[heads[-1]].time_range.end - kernels[heads[0]].time_range.end) / 1e3 / steps
    one = kernels[heads[-2] + 1 : heads[-1] + 1]
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


def limits(shape: DecoderConfig, bandwidth: float, codec_bits: float, base_bytes: int) -> dict[str, float]:
    """Milliseconds that reading takes at ``bandwidth`` bytes/s: weights, keys and values of 32 requests, one delta.

    ``base_bytes``: of one weight of a block's linear.
    """
    hidden, kv = shape.hidden_size, shape.kv_heads * shape.head_dim
    block = hidden * (2 * shape.heads * shape.head_dim + 2 * kv + 3 * shape.intermediate_size)
    weights = base_bytes * shape.layers * block + 2 * shape.vocab_size * hidden
    cache = 32 * (512 + LONG / 2) * shape.layers * 2 * kv * 2
    delta = shape.layers * block * (codec_bits + 16 / 128) / 8
    return {name: 1e3 * size / bandwidth for name, size in (("weights", weights), ("cache", cache), ("delta", delta))}


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy on the device."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / (triton.testing.do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


async def measure(options: argparse.Namespace, put: Any) -> None:
    """Everything, one figure after the other, written as it comes."""
    shape = decoder_shape(options.shape)
    counts = [int(n) for n in options.versions.split(",")]
    bits = {"int4": 4, "int3": 3, "int2": 2, "int1": 1}[options.codec]
    put("machine", {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__})
    bandwidth = copy_bandwidth()
    put("limits_ms", {"bandwidth": bandwidth} | limits(shape, bandwidth, bits, 1 if options.base_dtype else 2))
    torch.cuda.empty_cache()
    delta = random_delta(shape, options.codec, outer=options.outer)
    size = sum(map(len, delta.blobs.values()))
    config = EngineConfig(
        device="cuda",
        dtype="bfloat16",
        base_dtype=options.base_dtype,
        max_model_len=min(2048, shape.max_positions),
        max_batch_tokens=8192,
        max_running=256,
        slots=max(1, *counts),
        slot_bytes=size,
        max_added_tokens=0,
        kv_prefix_cache=False,
        memory_fraction=options.memory_fraction,
    )
    began = time.perf_counter()
    source = RandomVersions(in_arena(delta))
    engine, registry = await started(shape, config, source)
    put("start_seconds", time.perf_counter() - began)
    began = time.perf_counter()
    await batch(engine, 4, 64, 4, 0, 1)
    put("first_requests_seconds", time.perf_counter() - began)
    for count in counts:
        began = time.perf_counter()
        await batch(engine, max(count, 1), 16, 2, count, 2)
        put(f"{count}.load_seconds", time.perf_counter() - began)
        for requests in (8, 32):
            if count <= requests and (requests == 32 or count in (0, 8)):
                put(f"{count}.step_{requests}", await step(engine, requests, count, options.runs))
        if count in (0, 8, 32):
            put(f"{count}.prefill", await prefill(engine, count, options.runs))
            put(f"{count}.saturated", await saturated(engine, registry, count, options.saturated_runs))
        if options.profile and count in (0, 8, 32):
            put(f"{count}.profile_32", await profile(engine, 32, count))
    await engine.check()
    await engine.stop()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results go, and every sample")
    parser.add_argument("--shape", default="8b", choices=("8b", "tiny"))
    parser.add_argument("--codec", default="int2", choices=("int4", "int3", "int2", "int1"))
    parser.add_argument("--outer", action="store_true", help="deltas change embedding and head too")
    parser.add_argument("--base-dtype", choices=("fp8",), help="of the base's linears; bfloat16 when absent")
    parser.add_argument("--versions", default="0,8,32", help="numbers of versions, 0 is the base alone")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--saturated-runs", type=int, default=3)
    parser.add_argument("--memory-fraction", type=float, default=0.9)
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--commit", help="of this tree, where it is no checkout")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here: run it where there is one")
    results: dict[str, Any] = {
        "commit": options.commit or commit(),
        "codec": options.codec,
        "base_dtype": options.base_dtype or "bfloat16",
        "outer": options.outer,
        "shape": options.shape,
    }

    def put(name: str, value: Any) -> None:
        results[name] = value
        shown = (
            {k: v for k, v in value.items() if k not in ("samples", "trace", "kernels")}
            if isinstance(value, dict)
            else value
        )
        sys.stdout.write(f"{name}: {shown}\n")
        sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))

    asyncio.run(measure(options, put))


if __name__ == "__main__":
    main()
