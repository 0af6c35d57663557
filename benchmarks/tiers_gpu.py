"""``python -m benchmarks.tiers_gpu --json FILE``: one delta's way from disk and arena to a GPU, and who notices.

The delta has the shape of an 8B model in int2, about 1.9 GB. Links are measured in the same run.
"""

import argparse
import asyncio
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_model import build, decoder_shape, random_delta
from benchmarks.tiers_engine import PAGE, Source, with_engine
from deltazip_deployments.node_store.arena import Arena, map_arena
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.config import MIB, EngineConfig
from deltazip_ray.models.decoder_config import DecoderConfig
from deltazip_ray.residency.tiers import HostDelta, HostMemory


def seconds(work: Callable[[], object], runs: int = 5) -> list[float]:
    """How long each run took, the device's part included."""
    samples = []
    for _ in range(runs):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - began)
    return samples


def links(size: int) -> dict[str, float]:
    """Bytes a second from host to device: pinned by torch in one copy, and pageable."""
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    found = {}
    for name, source in (
        ("pinned", torch.empty(size, dtype=torch.uint8, pin_memory=True)),
        ("pageable", torch.ones(size, dtype=torch.uint8)),
    ):
        found[name] = size / min(seconds(lambda source=source: target.copy_(source, non_blocking=True)))  # type: ignore[misc]
    return found


def with_digests(delta: HostDelta) -> HostDelta:
    """The same with a manifest whose digests are those of the bytes."""
    blobs = tuple(b.model_copy(update={"digest": sha256_hex(delta.blobs[b.block])}) for b in delta.manifest.blobs)
    return replace(delta, manifest=delta.manifest.model_copy(update={"blobs": blobs}))


def in_shared_memory(delta: HostDelta) -> tuple[Arena, HostDelta]:
    """The delta in an arena such as a node store has, and as a replica maps it: read-only."""
    sizes = {block: -(-len(data) // PAGE) * PAGE for block, data in delta.blobs.items()}
    arena = Arena(Path("/dev/shm"), sum(sizes.values()))
    mapped, blobs, start = map_arena(arena.ref), {}, 0
    for block, data in delta.blobs.items():
        arena.buffer[start : start + len(data)] = data
        blobs[block] = mapped[start : start + len(data)]
        start += sizes[block]
    return arena, HostDelta(delta.manifest, blobs, "host", HostMemory(mapped))


def copies(shape: DecoderConfig, config: EngineConfig, delta: HostDelta, memory: HostMemory) -> dict[str, Any]:
    """Everything that needs no engine."""
    core = build(shape, config.model_copy(update={"attention": "sdpa", "kv_blocks": 256, "slots": 2}), Path())
    slots, size = core.slots, sum(len(data) for data in delta.blobs.values())
    found: dict[str, Any] = {"bytes": size, "links": links(size)}
    began = time.perf_counter()
    slots.uploads.lock_pages(memory)
    found["lock_pages_s"] = time.perf_counter() - began
    found["slot_s"] = seconds(partial(slots.load, 0, delta), runs=22)[1:]
    found["slot_of_pinned"] = size / statistics.median(found["slot_s"]) / found["links"]["pinned"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this tree")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--no-engine", action="store_true")
    options = parser.parse_args()
    shape = decoder_shape(options.shape)
    delta = with_digests(random_delta(shape, "int2", outer=False))
    room = max(64 * MIB, int(1.1 * sum(len(data) for data in delta.blobs.values())))
    config = EngineConfig(
        device="cuda", dtype="bfloat16", slots=16, slot_bytes=room, max_model_len=2048, max_added_tokens=64
    )
    result: dict[str, Any] = {
        "machine": {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cores": os.cpu_count()},
        "commit": options.commit,
        "shape": options.shape,
    }
    _arena, mapped = in_shared_memory(delta)
    if mapped.memory is None:
        raise SystemExit("the delta is in no arena")
    result |= copies(shape, config, mapped, mapped.memory)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    if not options.no_engine:
        gc.collect()
        torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory() as folder:
            result |= asyncio.run(with_engine(shape, config, Source(mapped), Path(folder), options.rounds))
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
