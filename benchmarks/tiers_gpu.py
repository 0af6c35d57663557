"""``python -m benchmarks.tiers_gpu --json FILE``: one delta's way from disk and arena to a GPU, and who notices.

The delta has the shape of an 8B model in int2, about 1.9 GB. Links are measured in the same run.
"""

import argparse
import asyncio
import gc
import json
import mmap
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from benchmarks.engine_model import DIGEST, RandomVersions, build, decoder_shape, random_delta
from deltazip_deployments.node_store.arena import Arena, map_arena
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.config import EngineConfig, NodeStoreConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.engine.core import EngineCore
from deltazip_ray.engine.device_slots import DeviceSlots
from deltazip_ray.engine.step_loop import Launched
from deltazip_ray.engine.uploads import CHUNK, Uploads
from deltazip_ray.models.decoder_config import DecoderConfig
from deltazip_ray.residency.host_cache import HostCache
from deltazip_ray.residency.tiers import HostDelta, HostMemory
from deltazip_ray.scheduler.batch import Batch
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

MIB = 1 << 20
PAGE = mmap.PAGESIZE


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


def chunks(memory: HostMemory, uploads: Uploads) -> dict[str, float]:
    """Bytes a second of a whole arena by the size of a chunk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may not be written
        source = torch.frombuffer(memory.view, dtype=torch.uint8)
    target = torch.empty(len(source), dtype=torch.uint8, device="cuda")
    found = {}
    for chunk in (1, 2, 4, 8, 16, 64):
        uploads.copier.chunk = chunk * MIB

        def copy() -> None:
            with uploads.beside_steps() as upload:
                upload.copy(target, source)

        found[f"{chunk} MiB"] = len(source) / min(seconds(copy))
    uploads.copier.chunk = CHUNK
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


def out_of_page_cache(folder: Path) -> list[Path]:
    """The folder's files, none of which is in memory any more."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return files


def disk_bandwidth(folder: Path, threads: int, buffer: memoryview) -> float:
    """Bytes a second of all blobs, read as the disk tier reads them, but nothing else done with them."""
    files = [path for path in out_of_page_cache(folder) if path.stat().st_size > MIB]
    starts = [sum(-(-f.stat().st_size // PAGE) * PAGE for f in files[:i]) for i in range(len(files))]

    def read(path: Path, start: int) -> int:
        with path.open("rb", buffering=0) as file:
            size, position = path.stat().st_size, 0
            while position < size and (count := file.readinto(buffer[start + position : start + size])):
                position += count
        return position

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, files, starts))
    return total / (time.perf_counter() - began)


@dataclass
class Source(RandomVersions):
    """Any version from an arena, all with the same bytes, or where there is a cache, those of that."""

    cache: HostCache | None = None
    memory: HostMemory | None = None
    """What the cache works on."""
    came: float = 0.0
    """When the cache had a version."""

    async def acquire(self, version: str) -> HostDelta:
        """At once, or from the cache."""
        if self.cache is None:
            return await super().acquire(version)
        held = await self.cache.acquire(version)
        self.came = time.perf_counter()
        return replace(held, memory=self.memory)

    async def release(self, version: str) -> None:
        """Where it came from."""
        if self.cache is not None:
            await self.cache.release(version)


async def from_disk(engine: AsyncEngine, source: Source, folder: Path, runs: int) -> dict[str, Any]:
    """Cold starts of a version that is on disk: to the arena, verified, and on to its first token."""
    catalog, delta = Catalog(FileStore(folder / "store"), DIGEST), source.delta
    version = delta.manifest.version()
    for blob in delta.manifest.blobs:
        catalog.store.put(catalog.blob_key(blob.digest), bytes(delta.blobs[blob.block]))
    catalog.store.put(f"{DIGEST}/versions/{version}.json", delta.manifest.canonical())
    settings = NodeStoreConfig(disk_dir=folder / "disk", fetch_threads=16)
    arena = Arena(Path("/dev/shm"), sum(-(-len(data) // PAGE) * PAGE for data in delta.blobs.values()))
    source.memory = HostMemory(arena.buffer)
    await engine.adopt(source.memory)
    samples: list[dict[str, float]] = []
    bandwidths: list[float] = []
    for run in range(runs + 1):
        if run:
            out_of_page_cache(folder / "disk")
            bandwidths.append(disk_bandwidth(folder / "disk", 16, arena.buffer))
        out_of_page_cache(folder / "disk" if run else folder)
        source.cache = HostCache(catalog, arena.buffer, settings, CollectorRegistry())
        began = time.perf_counter()
        seconds, _ = await first_token(engine, version)
        samples.append({"host_s": source.came - began, "first_token_s": seconds})
        engine.retire(version)
        while len(list((folder / "disk").glob("*-*"))) <= len(delta.blobs):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await source.cache.close()
    source.cache = None
    return {"samples": samples[1:], "from_store": samples[0], "disk_bytes_per_s": bandwidths, "threads": 16}


@dataclass
class Timed:
    """A runner that notes when each step's tokens were there."""

    runner: Any
    times: list[float] = field(default_factory=list)
    launch_ms: list[float] = field(default_factory=list)
    """What the host took to launch each."""

    def launch(self, batch: Batch) -> "TimedStep":
        """As the runner."""
        began = time.perf_counter()
        launched = self.runner.launch(batch)
        self.launch_ms.append(1e3 * (time.perf_counter() - began))
        return TimedStep(launched, self.times)

    def synchronize(self) -> None:
        """As the runner."""
        self.runner.synchronize()


@dataclass
class TimedStep:
    """A step whose end is noted."""

    launched: Launched
    times: list[float]

    def wait(self) -> Any:
        """As the step."""
        drawn = self.launched.wait()
        self.times.append(time.perf_counter())
        return drawn

    def scores(self) -> Any:
        """As the step."""
        return self.launched.scores()


def spread(gaps: Sequence[float]) -> dict[str, float]:
    """Of milliseconds between the ends of neighbouring steps."""
    gaps = sorted(gaps)
    last = len(gaps) - 1
    quantiles = {f"p{q}": gaps[min(last, q * len(gaps) // 100)] for q in (50, 90, 99)}
    return {"steps": len(gaps), **quantiles, "max": gaps[last]}


@dataclass
class Traffic:
    """32 requests of 8 warm versions that decode until they are told to end."""

    engine: AsyncEngine
    timed: Timed
    length: int
    ended: bool = False

    async def client(self, index: int) -> None:
        """One request."""
        sampling = SamplingParams(max_tokens=self.length, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(str(index), f"{index % 8:064x}", tuple(range(1, 65)), sampling)
        async for _ in self.engine.generate(request):
            if self.ended:
                return

    def gaps_since(self, begin: int) -> list[float]:
        """Milliseconds between the ends of the steps from one on."""
        return [1e3 * (after - before) for before, after in pairwise(self.timed.times[begin:])]

    async def steps(self, count: int) -> list[float]:
        """Wait for that many steps; returns the milliseconds between their ends."""
        begin = len(self.timed.times)
        while len(self.timed.times) <= begin + count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return self.gaps_since(begin)

    async def load(self, versions: Sequence[str]) -> tuple[list[float], list[float]]:
        """Load versions one after the other; returns milliseconds between steps meanwhile, and each one's seconds."""
        begin, loads = len(self.timed.times), []
        for version in versions:
            began = time.perf_counter()
            if not await self.engine.prefetch(version):
                raise SystemExit("a version was not loaded: are there too few slots?")
            loads.append(time.perf_counter() - began)
        await self.steps(1)
        return self.gaps_since(begin), loads


async def with_engine(
    shape: DecoderConfig, config: EngineConfig, source: Source, folder: Path, rounds: int
) -> dict[str, Any]:
    """What needs an engine: first tokens, and decode steps with and without loads of other versions."""
    timed = Timed(None)
    slots: list[DeviceSlots] = []

    def timed_build(config: EngineConfig, base: Path) -> EngineCore:
        core = build(shape, config, base)
        timed.runner = core.runner
        slots.append(core.slots)
        return replace(core, runner=timed)  # type: ignore[arg-type]

    engine = AsyncEngine(config, Path(), source, CollectorRegistry(), build=timed_build)
    await engine.start()
    found: dict[str, Any] = {"beside": await beside_traffic(engine, timed, config.max_model_len - 80, 8, rounds)}
    found |= await first_tokens(engine, timed, slots[0])
    found["disk"] = await from_disk(engine, source, folder, runs=5)
    await engine.stop()
    return found


async def beside_traffic(engine: AsyncEngine, timed: Timed, length: int, cold: int, rounds: int) -> dict[str, Any]:
    """Decode steps with and without loads of other versions, ``cold`` one after the other."""
    traffic = Traffic(engine, timed, length)
    clients = [asyncio.create_task(traffic.client(index)) for index in range(32)]
    await traffic.steps(60)
    quiet: list[float] = []
    loading: list[float] = []
    seconds: list[float] = []
    for turn in range(rounds):
        quiet += await traffic.steps(100)
        gaps, loads = await traffic.load([f"{1000 + turn * cold + index:064x}" for index in range(cold)])
        loading += gaps
        seconds += loads
    traffic.ended = True
    await asyncio.gather(*clients)
    return {"quiet_ms": spread(quiet), "loading_ms": spread(loading), "load_s": seconds}


async def first_tokens(engine: AsyncEngine, timed: Timed, slots: DeviceSlots) -> dict[str, Any]:
    """Seconds to the first tokens of versions that are in the arena, and of others that are in their slots.

    The slots are wiped before: a step that does not wait for its weights makes other numbers than a later one.
    """
    cold = {overlap: [f"{2000 + 100 * overlap + index:064x}" for index in range(5)] for overlap in (False, True)}
    warm = [f"{3000 + index:064x}" for index in range(5)]
    found: dict[bool, list[tuple[float, str]]] = {False: [], True: []}
    slots.memory.zero_()
    torch.cuda.synchronize()
    for overlap in (False, True):
        slots.overlap = overlap
        found[overlap] += [await first_token(engine, version, told=True) for version in cold[overlap]]
    for version in warm:
        await engine.prefetch(version)
    await asyncio.sleep(0.2)
    steps = len(timed.launch_ms)
    again = [await first_token(engine, version, told=True) for version in warm]
    return {
        "first_token_s": [seconds for seconds, _ in found[False]],
        "first_token_overlapped_s": [seconds for seconds, _ in found[True]],
        "first_token_warm_s": [seconds for seconds, _ in again],
        "first_token_launch_ms": timed.launch_ms[steps:],
        "first_tokens_equal": len({told for _, told in found[False] + found[True] + again}) == 1,
    }


async def first_token(engine: AsyncEngine, version: str, *, told: bool = False) -> tuple[float, str]:
    """Seconds to the only token of a request; if ``told``, its log-probability with all digits."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0 if told else None)
    began, logprobs = time.perf_counter(), ""
    async for chunk in engine.generate(GenerateRequest("first", version, tuple(range(1, 65)), sampling)):
        logprobs += f"{chunk.tokens}{chunk.logprobs}"
    return time.perf_counter() - began, logprobs


def copies(shape: DecoderConfig, config: EngineConfig, delta: HostDelta, memory: HostMemory) -> dict[str, Any]:
    """Everything that needs no engine."""
    core = build(shape, config.model_copy(update={"attention": "sdpa", "kv_blocks": 256, "slots": 2}), Path())
    slots, size = core.slots, sum(len(data) for data in delta.blobs.values())
    found: dict[str, Any] = {"bytes": size, "links": links(size)}
    began = time.perf_counter()
    slots.uploads.lock_pages(memory)
    found["lock_pages_s"] = time.perf_counter() - began
    found["chunks_bytes_per_s"] = chunks(memory, slots.uploads)
    found["slot_s"] = seconds(partial(slots.load, 0, delta), runs=11)[1:]
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
