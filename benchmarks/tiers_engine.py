"""What needs an engine of the tiers' benchmark: first tokens of cold versions, and steps beside loads."""

import asyncio
import gc
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from benchmarks.engine_model import DIGEST, RandomVersions, build
from deltazip_deployments.node_store.arena import Arena
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.config import MIB, EngineConfig, NodeStoreConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.engine.core import EngineCore
from deltazip_ray.engine.device_slots import DeviceSlots
from deltazip_ray.engine.step_loop import Launched
from deltazip_ray.models.decoder_config import DecoderConfig
from deltazip_ray.residency.host_cache import HostCache
from deltazip_ray.residency.tiers import HostDelta, HostMemory, Tier
from deltazip_ray.scheduler.batch import Batch
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

PAGE = mmap.PAGESIZE
PROMPT = 16
"""Tokens."""
_RUNS = 7


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
        seconds, _ = await first_token(engine, version, "disk" if run else "remote")
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

    def launch(self, batch: Batch) -> "TimedStep":
        """As the runner."""
        return TimedStep(self.runner.launch(batch), self.times)

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
        begin = len(self.timed.times)
        loads = [await prefetched(self.engine, version) for version in versions]
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
    gc.collect()
    gc.freeze()  # as replicas do
    found: dict[str, Any] = {"beside": await beside_traffic(engine, timed, config.max_model_len - 80, 8, rounds)}
    found["first_tokens"] = await first_tokens(engine, slots[0])
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
    while engine.stats().running:  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # requests that were left end with the next step
    return {"quiet_ms": spread(quiet), "loading_ms": spread(loading), "load_s": seconds}


async def first_tokens(engine: AsyncEngine, slots: DeviceSlots) -> dict[str, Any]:
    """Of versions that are in the arena, published when all of it is there or used while they arrive; and of a
    resident one. Also how long loads take alone, published at their ends. All on an idle engine."""
    found: dict[str, Any] = {"prompt_tokens": PROMPT, "answers": {}}
    configured = slots.overlap
    for way, overlap in (("overlapped", True), ("published", False)):
        slots.overlap = overlap
        runs = [await over_zeros(engine, slots, f"{2000 + 100 * overlap + i:064x}") for i in range(_RUNS + 2)]
        found[f"{way}_s"] = [seconds for seconds, _ in runs[2:]]
        found["answers"][way] = [answer for _, answer in runs]
    version = f"{3000:064x}"
    await prefetched(engine, version)
    found["answers"]["resident"] = [(await first_token(engine, version, "device"))[1]]
    # Other tokens than before: nothing of these prompts is in the prefix cache.
    found["resident_s"] = [(await first_token(engine, version, "device", 20 * i))[0] for i in range(1, _RUNS + 1)]
    found["load_s"] = [await prefetched(engine, f"{4000 + i:064x}") for i in range(_RUNS)]
    slots.overlap = configured
    return found


async def over_zeros(engine: AsyncEngine, slots: DeviceSlots, version: str) -> tuple[float, str]:
    """As :func:`first_token`, of a version in the arena, when the slots hold nothing: a step that does not wait for its
    weights makes other numbers then."""
    slots.memory.zero_()
    torch.cuda.synchronize()
    return await first_token(engine, version, "host")


async def prefetched(engine: AsyncEngine, version: str) -> float:
    """Seconds until a version is in its slot. Raises SystemExit when it does not come."""
    began = time.perf_counter()
    if not await engine.prefetch(version):
        raise SystemExit("a version was not loaded: are there too few slots?")
    return time.perf_counter() - began


async def first_token(engine: AsyncEngine, version: str, tier: Tier, start: int = 1) -> tuple[float, str]:
    """Seconds to the only token of a request, whose version must be found in ``tier``, and the token with its
    log-probability, all digits of it. The prompt begins with token ``start``."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0)
    prompt = tuple(range(start, start + PROMPT))
    began, answer = time.perf_counter(), ""
    async for chunk in engine.generate(GenerateRequest("first", version, prompt, sampling)):
        answer += f"{chunk.tokens}{chunk.logprobs}"
        if chunk.tier not in (tier, None):
            raise SystemExit(f"the version was in tier {chunk.tier}, not {tier}")
    return time.perf_counter() - began, answer
