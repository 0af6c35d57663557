"""``python -m benchmarks.serving_path --json FILE``: what it costs to bring tokens from the engine's steps to clients.

The application under Ray Serve with the real engine but for its runner, which computes nothing: a step launches
operations and is done ``STEP_S`` after the one before. Everybody decodes. How much longer steps take is what the rest
of the replica's process costs them; CPU time is told for each process of the way.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from benchmarks.engine_host import STEP_S, Clock, FreeRunner, FreeStep
from benchmarks.engine_model import SHAPES, build, decoder_shape
from benchmarks.serving_models import make_tokenizer
from benchmarks.serving_run import MARK
from benchmarks.serving_streams import measure
from deltazip_deployments.serving import running
from deltazip_kernels.bench.__main__ import commit
from deltazip_ray.config import AppConfig, EngineConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.engine.core import EngineCore
from deltazip_ray.residency.tiers import DeltaSource
from deltazip_ray.scheduler.batch import Batch

LENGTH = 2000
"""Tokens of an answer: more than are taken."""


class LaunchingRunner(FreeRunner):
    """Launches operations too; others get the interpreter between them."""

    def __init__(self, core: EngineCore, most: int, launches: int) -> None:
        super().__init__(core, most, Clock())
        self.launches = launches

    def launch(self, batch: Batch) -> FreeStep:
        """See FreeRunner."""
        for _ in range(self.launches):
            self.tokens.add_(0)
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
        return replace(core, runner=LaunchingRunner(core, config.max_running, self.launches))  # type: ignore[arg-type]


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
        "front": "HAProxy" if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else "Serve's proxy",
        "launches": options.launches,
        "least_step_ms": 1e3 * STEP_S,
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="path-") as name:
        folder = Path(name)
        os.environ[MARK] = name
        with running(config(folder), port=options.port, engine_factory=FreeEngine(options.launches)):
            for streams in map(int, options.streams.split(",")):
                found = asyncio.run(measure(options.port, folder, ["base"], streams, options.seconds, LENGTH))
                report["runs"].append(found)
                sys.stdout.write(f"{json.dumps(found)}\n")
                sys.stdout.flush()
                options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
