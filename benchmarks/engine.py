"""``python -m benchmarks.engine --json FILE``: the engine on one GPU, in process.

``step``: the time of N requests of 512 prompt and 136 output tokens, less that of the same with 8, over 128.
``saturated``: output tokens a second of 512 requests at once, 256 prompt and 128 output tokens, at most 256 running.
``decodes``: the engine's own time of steps in which all of N requests decode, behind 256 prompt tokens.
The figures come in the order of their worth, and each is written when it is there.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from prometheus_client import CollectorRegistry

from benchmarks.engine_model import RandomVersions, decoder_shape, in_arena, random_delta, started
from benchmarks.engine_profile import profile, profile_prompts
from benchmarks.engine_runs import LONG, batch, decodes, saturated, step
from deltazip_kernels.bench.__main__ import commit
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.models.decoder_config import DecoderConfig

BITS = {"int4": 4, "int3": 3, "int2": 2, "int1": 1}
Put = Callable[[str, Any], None]


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
    took_ms: float = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * len(source) / (took_ms * 1e-3)


def settings(options: argparse.Namespace, shape: DecoderConfig, slot_bytes: int) -> EngineConfig:
    """The engine's."""
    return EngineConfig(
        device="cuda",
        dtype="bfloat16",
        base_dtype=options.base_dtype,
        max_model_len=min(2048, shape.max_positions),
        max_batch_tokens=options.max_batch_tokens,
        max_running=256,
        slots=max(1, *options.versions, *options.growth),
        slot_bytes=slot_bytes,
        max_added_tokens=0,
        kv_prefix_cache=False,
        memory_fraction=options.memory_fraction,
        warm_up=True,
        warm_codecs=(options.codec,),
    )


async def goals(engine: AsyncEngine, registry: CollectorRegistry, options: argparse.Namespace, put: Put) -> None:
    """The figures that have goals."""
    for count in options.versions:
        await load(engine, count, put)
        for requests in (8, 32):
            if options.runs and count <= requests:
                put(f"{count}.step_{requests}", await step(engine, requests, count, options.runs))
        if options.saturated_runs:
            put(f"{count}.saturated", await saturated(engine, registry, count, options.saturated_runs))


async def growth(engine: AsyncEngine, registry: CollectorRegistry, options: argparse.Namespace, put: Put) -> None:
    """What more versions cost, and more requests."""
    for count in options.growth:
        await load(engine, count, put)
        put(f"{count}.decodes_32", await decodes(engine, registry, max(32, count), count))
    for count in options.versions:
        for requests in options.requests:
            if count <= requests:
                put(f"{count}.decodes_{requests}", await decodes(engine, registry, requests, count))
            if count > 1:
                put(f"{count}.zipf_{requests}", await decodes(engine, registry, requests, count, zipf=True))


async def details(engine: AsyncEngine, options: argparse.Namespace, put: Put) -> None:
    """Prompts, and where a step's time goes."""
    for count in options.versions:
        if options.profile:
            put(f"{count}.profile_32", await profile(engine, 32, 512, count))
            put(f"{count}.profile_256", await profile(engine, 256, 256, count))
        if options.prompts:
            put(f"{count}.prompts", await profile_prompts(engine, count))


async def load(engine: AsyncEngine, count: int, put: Put) -> None:
    """Have versions in slots."""
    began = time.perf_counter()
    await batch(engine, max(count, 1), 16, 2, count, 2)
    put(f"{count}.load_seconds", time.perf_counter() - began)


async def measure(options: argparse.Namespace, put: Put) -> None:
    """An engine, and its figures."""
    shape = decoder_shape(options.shape)
    put("machine", {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__})
    bandwidth = copy_bandwidth()
    base_bytes = 1 if options.base_dtype else 2
    put("limits_ms", {"bandwidth": bandwidth} | limits(shape, bandwidth, BITS[options.codec], base_bytes))
    torch.cuda.empty_cache()
    delta = random_delta(shape, options.codec, outer=options.outer)
    config = settings(options, shape, sum(map(len, delta.blobs.values())))
    engine, registry = await started(shape, config, RandomVersions(in_arena(delta)))
    stages = next(metric for metric in registry.collect() if metric.name == "deltazip_engine_start_seconds").samples
    put("start_seconds", {sample.labels["stage"]: sample.value for sample in stages})
    await goals(engine, registry, options, put)
    await growth(engine, registry, options, put)
    await details(engine, options, put)
    await engine.check()
    await engine.stop()


def numbers(text: str) -> list[int]:
    """``1,2,4``."""
    return [int(part) for part in text.split(",") if part]


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results go, and every sample")
    parser.add_argument("--shape", default="8b", choices=("8b", "tiny"))
    parser.add_argument("--codec", default="int2", choices=tuple(BITS))
    parser.add_argument("--outer", action="store_true", help="deltas change embedding and head too")
    parser.add_argument("--base-dtype", choices=("fp8",), help="of the base's linears; bfloat16 when absent")
    parser.add_argument("--versions", type=numbers, default="0,8,32", help="numbers of versions, 0 is the base alone")
    parser.add_argument("--growth", type=numbers, default="", help="more numbers, of which only decodes are measured")
    parser.add_argument("--requests", type=numbers, default="", help="numbers of requests whose decodes are measured")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--saturated-runs", type=int, default=3)
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--memory-fraction", type=float, default=0.95)
    parser.add_argument("--profile", action="store_true", help="where the time of a decode step goes")
    parser.add_argument("--prompts", action="store_true", help="where the time of a step with prompts goes")
    parser.add_argument("--commit", help="of this tree, where it is no checkout")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here: run it where there is one")
    return options


def main() -> None:
    """See the module."""
    options = arguments()
    results: dict[str, Any] = {
        "commit": options.commit or commit(),
        "codec": options.codec,
        "base_dtype": options.base_dtype or "bfloat16",
        "outer": options.outer,
        "shape": options.shape,
        "max_batch_tokens": options.max_batch_tokens,
    }

    def put(name: str, value: Any) -> None:
        results[name] = value
        shown = {k: v for k, v in value.items() if k not in ("samples", "trace")} if isinstance(value, dict) else value
        sys.stdout.write(f"{name}: {shown}\n")
        sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))

    asyncio.run(measure(options, put))


if __name__ == "__main__":
    main()
