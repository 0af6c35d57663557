"""``python -m benchmarks.scheduling --json FILE``: what the host spends on a step, and policies under simulated load.

Host: CPU time of ``schedule`` and ``update`` together, one step ahead, with everybody decoding.
Policies: see :mod:`benchmarks.scheduling_fronts`. Everything is seeded; only the host's times vary.
"""

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.scheduling_fronts import Costs, Front, Line, Project, SkipTheLine, World
from deltazip_ray.config import EngineConfig
from deltazip_ray.scheduler.batch import Drawn
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams
from deltazip_ray.scheduler.scheduler import Scheduler

Arrivals = list[tuple[float, GenerateRequest]]
VERSIONS, SLOTS = 32, 8
CONFIG = EngineConfig(max_model_len=4096, max_batch_tokens=2048, max_running=64, kv_blocks=20_000, block_size=16)
FRONTS: dict[str, type[Front]] = {"arrival": Line, "skip the line": SkipTheLine, "project": Project}


def host(running: int, steps: int = 400) -> dict[str, Any]:
    """CPU microseconds a step, of ``running`` requests of 16 versions."""
    config = CONFIG.model_copy(update={"max_running": running, "max_batch_tokens": 8192, "kv_blocks": 200 * running})
    sched = Scheduler(config)
    for i in range(running):
        prompt = tuple(range(i, i + 512))
        sched.add(GenerateRequest(str(i), f"v{i % 16}", prompt, SamplingParams(max_tokens=2048)), i % 16)
    while sched.num_waiting:
        batch = sched.schedule()
        sched.update(batch, Drawn([7] * len(batch.sampling_chunks)))
    before, samples = sched.schedule(), []
    for _ in range(steps):
        drawn = Drawn([7] * len(before.sampling_chunks))
        began = time.process_time_ns()
        batch = sched.schedule()
        sched.update(before, drawn)
        sched.take_news()
        samples.append((time.process_time_ns() - began) / 1e3)
        before = batch
    return {"running": running, "us": statistics.median(samples), "samples": samples}


def request(dice: random.Random, name: int, version: int) -> GenerateRequest:
    """Prompt of some 300 and output of some 130 tokens; no two prompts begin alike."""
    prompt = min(int(dice.lognormvariate(5.4, 0.8)) + 4, 2000)
    output = min(int(dice.lognormvariate(4.6, 0.7)) + 4, 1000)
    sampling = SamplingParams(max_tokens=output)
    return GenerateRequest(str(name), f"v{version}", (1_000_000 + name,) + (5,) * (prompt - 1), sampling)


def poisson(count: int, rate: float, weights: list[float], seed: int) -> Arrivals:
    """Requests at ``rate`` a second, of versions as popular as ``weights`` say."""
    dice, now, arrivals = random.Random(seed), 0.0, []
    for i in range(count):
        now += dice.expovariate(rate)
        arrivals.append((now, request(dice, i, dice.choices(range(len(weights)), weights)[0])))
    return arrivals


def flood(seed: int) -> Arrivals:
    """Version 0 sends 600 requests at once; seven others send 3 a second each, for 20 seconds."""
    dice = random.Random(seed)
    arrivals = poisson(420, 21.0, [0.0] + [1.0] * 7, seed)
    return sorted([(0.5, request(dice, 1000 + i, 0)) for i in range(600)] + arrivals, key=lambda item: item[0])


SCENARIOS = {
    "zipf": lambda seed: poisson(1200, 22.0, [(i + 1) ** -1.5 for i in range(VERSIONS)], seed),
    "uniform": lambda seed: poisson(600, 10.0, [1.0] * VERSIONS, seed),
    "flood": flood,
}


def play(scenario: str, front: str, seed: int) -> dict[str, Any]:
    """One scenario with one policy."""
    arrivals = SCENARIOS[scenario](seed)
    world = World(CONFIG, Costs(), arrivals)
    asyncio.run(world.run(FRONTS[front](world, SLOTS)))
    world.sched.check()
    waits: dict[str, list[float]] = {"all": [], "v0": [], "others": []}
    for one in world.served.values():
        if one.first is None or one.ended is None:
            raise RuntimeError(f"{scenario}, {front}: request {one.request.request_id} was never answered")
        for group in ("all", "v0" if one.request.version == "v0" else "others"):
            waits[group].append(one.first - one.arrived)
    totals = [one.ended - one.arrived for one in world.served.values() if one.ended is not None]
    ends = [one.ended for one in world.served.values() if one.ended is not None]
    return {
        "scenario": scenario,
        "policy": front,
        "seed": seed,
        "tokens_per_s": sum(world.output.values()) / max(ends),
        "seconds": max(ends),
        "loads": world.loads,
        "preempted": world.preempted,
        "steps": world.steps,
        "latency_s": quantiles(totals),
        "ttft_s": {group: quantiles(values) for group, values in waits.items() if values},
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile, maximum."""
    ordered = sorted(values)
    return {
        name: ordered[min(int(part * len(ordered)), len(ordered) - 1)]
        for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
    }


def host_table(report: dict[str, Any]) -> str:
    """The host's share in Markdown."""
    heads = "".join(f" {row['running']} |" for row in report["host"])
    cells = "".join(f" {row['us'] / 1e3:.2f} ms |" for row in report["host"])
    return f"| running requests |{heads}\n|---{'|--:' * len(report['host'])}|\n| CPU time a step |{cells}"


def table(report: dict[str, Any]) -> str:
    """The policies in Markdown: medians of the seeds."""
    heads = [
        "load",
        "policy",
        "tokens/s",
        "first token p50",
        "p90",
        "max",
        "p90 of all but v0",
        "answer p50",
        "p90",
        "max",
    ]
    lines = ["| " + " | ".join([*heads, "loads", "preempted"]) + " |", "|---|---" + "|--:" * 10 + "|"]
    for scenario in SCENARIOS:
        for front in FRONTS:
            runs = [r for r in report["policies"] if (r["scenario"], r["policy"]) == (scenario, front)]
            firsts = [[r["ttft_s"]["all"][q] for r in runs] for q in ("p50", "p90", "max")]
            firsts.append([r["ttft_s"]["others"]["p90"] for r in runs])
            answers = [[r["latency_s"][q] for r in runs] for q in ("p50", "p90", "max")]
            seconds = [f"{statistics.median(times):.2f} s" for times in (*firsts, *answers)]
            rate, loads, preempted = (
                statistics.median([r[key] for r in runs]) for key in ("tokens_per_s", "loads", "preempted")
            )
            cells = [scenario, front, f"{rate:,.0f}", *seconds, f"{loads:.0f}", f"{preempted:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure, write and show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    report = {
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "costs_s": asdict(Costs()),
        "host": [host(running) for running in (32, 64, 128, 256)],
        "policies": [
            play(scenario, front, seed) for scenario in SCENARIOS for front in FRONTS for seed in range(options.seeds)
        ],
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(host_table(report))
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
