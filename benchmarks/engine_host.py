"""``python -m benchmarks.engine_host --json FILE``: CPU time of the engine's Python; its device is free.

Everybody decodes, one step ahead; 16 versions. The engine is the real one but for its runner, which draws the
same token always. Times are CPU time of threads, so that a busy machine does not count: ``step`` of the thread that
steps, by stage, and ``loop`` of the event loop, which hands the tokens to those who wait for them.
"""

import argparse
import asyncio
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from prometheus_client import CollectorRegistry

from benchmarks.engine_model import RandomVersions, build, decoder_shape, random_delta
from deltazip_kernels.bench.__main__ import commit
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.engine.core import EngineCore
from deltazip_ray.engine.fetched import Fetched
from deltazip_ray.engine.runner import LaunchedStep
from deltazip_ray.engine.sampling import SampledTokens, StepDraws
from deltazip_ray.engine.step_inputs import RecordedInputs
from deltazip_ray.layers.attention.paged import PagedBackend
from deltazip_ray.scheduler.batch import Batch
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

VERSIONS, PROMPT, STEP_S = 16, 64, 0.005
KINDS = {
    "greedy": SamplingParams(max_tokens=1900, temperature=0.0, ignore_eos=True),
    "top-p": SamplingParams(max_tokens=1900, temperature=0.8, top_p=0.9, ignore_eos=True),
}
_T = TypeVar("_T")


@dataclass
class Clock:
    """CPU seconds of one thread, by stage; a stage may lie inside another, which then does not count it."""

    spent: dict[str, float] = field(default_factory=dict)
    _inside: float = 0.0

    def timed(self, stage: str, call: Callable[..., _T]) -> Callable[..., _T]:
        """``call``, whose time counts for ``stage``."""

        def run(*args: Any) -> _T:
            outer, self._inside = self._inside, 0.0
            began = time.thread_time()
            try:
                return call(*args)
            finally:
                took = time.thread_time() - began
                self.spent[stage] = self.spent.get(stage, 0.0) + took - self._inside
                self._inside = outer + took

        return run


class FreeRunner:
    """Prepares inputs and draws and hands out tokens as the real runner does; waits for ``STEP_S`` between."""

    def __init__(self, core: EngineCore, most: int, clock: Clock) -> None:
        cpu = torch.device("cpu")
        attention = PagedBackend(core.runner.attention.shape, torch.bfloat16, cpu, decodes=most)
        attention.allocate(1)
        inputs = RecordedInputs(attention, cpu, most, VERSIONS, most * 130)
        self.fill = clock.timed("inputs", inputs.fill)
        self.draws = StepDraws(cpu)
        self.tokens = torch.zeros(most, dtype=torch.int64)
        self.steps = 0
        self.done_at = 0.0

    def launch(self, batch: Batch) -> "FreeStep":
        """A step that is done ``STEP_S`` after the one before."""
        self.steps += 1
        self.done_at = max(self.done_at, time.perf_counter()) + STEP_S
        if batch.num_tokens == len(batch.chunks):
            self.fill(batch, len(self.tokens))
        self.draws.stage(batch)
        tokens = self.tokens[: len(batch.sampling_chunks)]
        return FreeStep(LaunchedStep(SampledTokens(tokens, Fetched(tokens)), None, None), self.done_at)

    def synchronize(self) -> None:
        """Nothing to wait for."""


@dataclass(frozen=True)
class FreeStep:
    """A step on a device that only waits."""

    step: LaunchedStep
    done_at: float

    def wait(self) -> Any:
        """As the real one."""
        time.sleep(max(0.0, self.done_at - time.perf_counter()))
        return self.step.wait()

    def scores(self) -> Any:
        """As the real one."""
        return self.step.scores()


def core_of(running: int, clock: Clock, config: EngineConfig, base: Path) -> EngineCore:
    """The real parts but for the runner, with stages timed."""
    core = build(decoder_shape("tiny"), config, base)
    runner = FreeRunner(core, running, clock)
    for name in ("schedule", "update", "take_news"):
        setattr(core.scheduler, name, clock.timed("scheduler", getattr(core.scheduler, name)))
    runner.launch = clock.timed("draws", runner.launch)  # type: ignore[method-assign]
    return replace(core, runner=runner)  # type: ignore[arg-type]


async def take(engine: AsyncEngine, request: GenerateRequest) -> None:
    """Take a request's tokens."""
    async for _ in engine.generate(request):
        pass


async def measure(running: int, sampling: SamplingParams, seconds: float) -> dict[str, Any]:
    """Microseconds of CPU time a step."""
    clock = Clock()
    config = EngineConfig(
        max_model_len=2048, max_batch_tokens=8192, max_running=running, slots=VERSIONS, slot_bytes=1 << 20,
        kv_blocks=running * 130, max_added_tokens=0, async_steps=True, threads=1,
    )  # fmt: skip
    shape = decoder_shape("tiny")
    source = RandomVersions(random_delta(shape, "int2", outer=False))
    engine = AsyncEngine(config, Path(), source, CollectorRegistry(), build=partial(core_of, running, clock))
    await engine.start()
    gc.unfreeze()  # the engine of the run before
    gc.collect()
    gc.freeze()  # as replicas do
    tasks = [
        asyncio.create_task(
            take(engine, GenerateRequest(str(i), f"{i % VERSIONS:064x}", tuple(range(i, i + PROMPT)), sampling))
        )
        for i in range(running)
    ]
    while engine.stats().running < running:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    parts = engine._parts
    if parts is None:
        raise RuntimeError("the engine has not started")
    runner: Any = parts.core.runner
    before = dict(clock.spent), runner.steps, time.process_time(), time.thread_time()
    await asyncio.sleep(seconds)
    steps = runner.steps - before[1]
    loop = (time.thread_time() - before[3]) / steps
    whole = (time.process_time() - before[2]) / steps
    stages = {name: (spent - before[0][name]) / steps for name, spent in clock.spent.items()}
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await engine.check()
    await engine.stop()
    times = stages | {"rest of the step thread": whole - loop - sum(stages.values()), "event loop": loop, "all": whole}
    return {"running": running, "steps": steps, "us": {name: 1e6 * spent for name, spent in times.items()}}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--running", default="32,64,128,256", help="numbers of requests")
    parser.add_argument("--commit", help="of this tree, where it is no checkout")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "commit": options.commit or commit(),
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "step_s": STEP_S,
        "host": [],
    }
    for (kind, sampling), running in product(KINDS.items(), map(int, options.running.split(","))):
        runs = [asyncio.run(measure(running, sampling, options.seconds)) for _ in range(options.runs)]
        stages = {name: statistics.median(run["us"][name] for run in runs) for name in runs[0]["us"]}
        report["host"].append({"kind": kind, "running": running, "us": stages, "runs": runs})
        told = ", ".join(f"{name} {us:.0f} us" for name, us in stages.items())
        sys.stdout.write(f"{kind}, {running}: {told}\n")
        sys.stdout.flush()
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
