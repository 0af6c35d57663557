"""``python -m benchmarks.engine_split --json FILE``: what lending idle slots to the KV cache brings on a GPU.

8B shape, 8 slots for int2 deltas, and a cache of its own with room for 64 requests. With the split fixed, and with one
that moves (``slots_min: 1``): output tokens a second of the base's requests, 256 prompt and 128 output tokens, at most
256 running; and with that load, seconds to the first token of each of 8 versions that are asked for at once.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_model import RandomVersions, decoder_shape, in_arena, random_delta, started
from benchmarks.engine_runs import batch, jobs
from deltazip_kernels.bench.__main__ import commit
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.models.decoder_config import DecoderConfig
from deltazip_ray.residency.tiers import HostDelta
from deltazip_ray.scheduler.request import GenerateRequest

SLOTS, PROMPT, OUTPUT = 8, 256, 128
BLOCKS = 64 * (PROMPT + OUTPUT) // 16


def settings(slot_bytes: int, slots_min: int | None) -> EngineConfig:
    """The engine's."""
    return EngineConfig(
        device="cuda",
        dtype="bfloat16",
        max_model_len=2048,
        max_batch_tokens=8192,
        max_running=256,
        slots=SLOTS,
        slots_min=slots_min,
        slot_bytes=slot_bytes,
        max_added_tokens=0,
        kv_blocks=BLOCKS,
        kv_prefix_cache=False,
        memory_fraction=0.95,
        warm_up=True,
        warm_codecs=("int2",),
    )


async def first_tokens(engine: AsyncEngine) -> list[float]:
    """Seconds of each version, while requests of the base hold the cache."""
    began = time.perf_counter()

    async def one(request: GenerateRequest) -> float:
        async for _ in engine.generate(request):
            break
        return time.perf_counter() - began

    return sorted(await asyncio.gather(*map(one, jobs(engine, SLOTS, 16, 1, SLOTS, 9))))


async def measure(shape: DecoderConfig, delta: HostDelta, slots_min: int | None, requests: int) -> dict[str, Any]:
    """One engine."""
    config = settings(sum(map(len, delta.blobs.values())), slots_min)
    engine, _ = await started(shape, config, RandomVersions(delta))
    if slots_min is not None:
        await batch(engine, requests, PROMPT, OUTPUT, 0, 1)  # by its end slots are lent
    found: dict[str, Any] = {"slots": engine.stats().slots, "kv_blocks": engine.stats().kv_blocks}
    seconds = await batch(engine, requests, PROMPT, OUTPUT, 0, 2)
    found["tokens_per_s"] = requests * OUTPUT / seconds
    load = asyncio.create_task(batch(engine, requests, PROMPT, OUTPUT, 0, 3))
    await asyncio.sleep(seconds / 3)
    before = engine.stats().preemptions
    found["first_token_s"] = await first_tokens(engine)
    found |= {"slots_then": engine.stats().slots, "preempted": engine.stats().preemptions - before}
    await load
    await engine.check()
    await engine.stop()
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", help="of this tree, where it is no checkout")
    parser.add_argument("--requests", type=int, default=512)
    options = parser.parse_args()
    shape = decoder_shape("8b")
    delta = in_arena(random_delta(shape, "int2", outer=False))
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    report: dict[str, Any] = {"commit": options.commit or commit(), "machine": machine, "requests": options.requests}
    for name, slots_min in (("fixed", None), ("moving", 1)):
        report[name] = asyncio.run(measure(shape, delta, slots_min, options.requests))
        torch.cuda.empty_cache()
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
