"""``python -m benchmarks.serving_path --json FILE``: what it costs to bring tokens from the engine's steps to clients.

The application under Ray Serve with the real engine but for its runner, which computes nothing: a step launches
operations and is done ``STEP_S`` after the one before. Everybody decodes. How much longer steps take is what the rest
of the replica's process costs them; CPU time is told for each process of the way.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.engine_host import STEP_S, FreeRunner, FreeStep
from benchmarks.engine_model import SHAPES, build, decoder_shape
from benchmarks.serving_models import make_tokenizer
from benchmarks.serving_run import MARK, processes
from deltazip_deployments.serving import running
from deltazip_kernels.bench.__main__ import commit
from deltazip_ray.config import AppConfig, EngineConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.engine.core import EngineCore
from deltazip_ray.residency.tiers import DeltaSource
from deltazip_ray.scheduler.batch import Batch

LENGTH = 2000
"""Tokens of an answer: more than are taken."""
PROCESSES = {
    "replica": b"ServeReplica:deltazip:replica",
    "router": b"ServeReplica:deltazip:router",
    "proxy": b"ProxyActor",
}


class LaunchingRunner(FreeRunner):
    """Launches operations too; others get the interpreter between them."""

    def __init__(self, most: int, launches: int) -> None:
        super().__init__(most)
        self.launches = launches

    def launch(self, batch: Batch) -> FreeStep:
        """See FreeRunner."""
        for _ in range(self.launches):
            self.logits[0].add_(0)
        return super().launch(batch)


@dataclass(frozen=True)
class FreeEngine:
    """An EngineFactory that travels to the replica."""

    launches: int

    def __call__(self, config: AppConfig, source: DeltaSource, registry: CollectorRegistry) -> AsyncEngine:
        """The real engine around a runner that computes nothing."""
        return AsyncEngine(config.engine, Path(), source, registry, build=self.core)

    def core(self, config: EngineConfig, base: Path) -> EngineCore:
        """All but the runner."""
        core = build(decoder_shape("tiny"), config, base)
        return replace(core, runner=LaunchingRunner(config.max_running, self.launches))  # type: ignore[arg-type]


async def take(port: int, index: int, arrived: list[float]) -> None:
    """Note when something of an answer comes; a client of its own would take the time of what is measured."""
    asked = {"model": "base", "prompt": [index + 1] * 16, "max_tokens": LENGTH, "temperature": 0, "stream": True}
    body = json.dumps(asked | {"ignore_eos": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        while await reader.read(1 << 16):
            arrived.append(time.perf_counter())
    finally:
        writer.close()


async def steps(port: int) -> tuple[float, float]:
    """How many the replica has made, and their seconds."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://127.0.0.1:{port}/metrics", timeout=10)).text
    families = {one.name: one for one in text_string_to_metric_families(text)}
    told = {sample.name[-5:]: sample.value for sample in families["deltazip_engine_step_seconds"].samples}
    return told["count"], told["s_sum"]


def cpu_seconds(folder: Path) -> dict[str, float]:
    """CPU time of each process of the way, until now."""
    spent = {}
    for name, mark in PROCESSES.items():
        (process,) = processes(folder, mark)
        ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
        spent[name] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return spent


async def measure(port: int, folder: Path, streams: int, seconds: float) -> dict[str, Any]:
    """One number of streams."""
    arrivals: list[list[float]] = [[] for _ in range(streams)]
    tasks = [asyncio.create_task(take(port, i, arrived)) for i, arrived in enumerate(arrivals)]
    await asyncio.sleep(3)
    before, spent, since = await steps(port), cpu_seconds(folder), time.perf_counter()
    await asyncio.sleep(seconds)
    after, until, ended = await steps(port), cpu_seconds(folder), time.perf_counter()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    step_s = (after[1] - before[1]) / (after[0] - before[0])
    tokens = streams * (ended - since) / step_s
    gaps = [b - a for one in arrivals for a, b in pairwise(one) if since < a and b < ended]
    quantiles = statistics.quantiles(gaps, n=100)
    return {
        "streams": streams,
        "step_ms": 1e3 * step_s,
        "groups_per_s": len(gaps) / (ended - since),
        "gap_ms": {f"p{percent}": 1e3 * quantiles[percent - 1] for percent in (50, 90, 99)},
        "cpu_us_per_token": {name: 1e6 * (until[name] - spent[name]) / tokens for name in spent},
    }


def config(folder: Path) -> AppConfig:
    """Nothing but a base."""
    make_tokenizer(SHAPES["tiny"]["vocab_size"]).save_pretrained(folder / "base")
    (folder / "store").mkdir()
    engine = {
        "max_running": 256, "max_model_len": 2048, "kv_blocks": 256 * 130, "slots": 2, "slot_bytes": 1 << 20,
        "async_steps": True, "threads": 1,
    }  # fmt: skip
    return AppConfig.model_validate(
        {"base": str(folder / "base"), "store": {"url": (folder / "store").as_uri()}, "engine": engine}
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--streams", default="16,64,256")
    parser.add_argument(
        "--launches", type=int, default=50, help="operations of a step; one that is not recorded has 400"
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--port", type=int, default=8125)
    parser.add_argument("--commit", help="of this tree, where it is no checkout")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "commit": options.commit or commit(),
        "cores": os.cpu_count(),
        "launches": options.launches,
        "least_step_ms": 1e3 * STEP_S,
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="path-") as name:
        folder = Path(name)
        os.environ[MARK] = name
        with running(config(folder), port=options.port, engine_factory=FreeEngine(options.launches)):
            for streams in map(int, options.streams.split(",")):
                found = asyncio.run(measure(options.port, folder, streams, options.seconds))
                report["runs"].append(found)
                sys.stdout.write(f"{json.dumps(found)}\n")
                sys.stdout.flush()
                options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
