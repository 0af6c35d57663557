"""Full fine-tunes of a base that is trained here, compressed in many ways, and what is left of them.

    python -m benchmarks.quality.run --scale full --device cuda --cache ~/.cache/deltazip/quality-proof \\
        --out quality.jsonl --deadline-s 480

Trains a base on text that the machine has and a full fine-tune for each task (cached), then measures every compressed
form of each; at last the LoRA adapters. Each line of the result is one form of one fine-tune; others say how the models
were trained. What the deadline leaves no time for is missing; another run with the same ``--out`` goes on there.
"""

import argparse
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.quality.measure import ADAPTER, Job, measure
from benchmarks.quality.models import BASE, Trainer, trained, unchanged_rows
from benchmarks.quality.prepare import SEED, Prepared, prepare
from benchmarks.quality.scales import SCALES, Scale
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import compile_layers, new_model
from deltazip_deployments.demo.checkpoints import CheckpointCache

SOURCES = ("data", "models", "prepare", "scales", "tasks", "text", "training")
"""What the models follow from."""
TAIL_S = 15.0
"""Seconds before the deadline at which the measuring ends."""


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    began = time.time()
    deadline = began + given.deadline_s - TAIL_S
    scale = SCALES[given.scale]
    cache = CheckpointCache(given.cache, f"{given.scale}-{_sources()}")
    context = get_context("spawn")
    preparing = context.Process(target=_prepare, args=(cache, scale, given.processes))
    preparing.start()
    model = new_model(scale, given.device, SEED)
    if given.compile:
        pretrain, finetune = scale.pretrain, scale.finetune
        compile_layers(model, [(pretrain.batch, pretrain.length + 1), (finetune.batch, finetune.length)])
        _log(began, "layers are compiled")
    _join([preparing])
    _log(began, "text is prepared")
    trainer = Trainer(model, Prepared(cache.path("data")), scale, cache)
    _write(
        given.out,
        {
            "commit": given.commit,
            "machine": machine(given.device),
            "parameters": model.num_parameters(),
            "scale": asdict(scale),
        },
    )
    _note(given.out, BASE, trainer.base())
    _log(began, "the base is trained")
    forms = tuple(name for name in given.forms or () if name != ADAPTER)
    # They load what is there already, and wait for the rest.
    with _measuring(given, cache, forms, deadline) if forms or not given.forms else nullcontext():
        for name in given.tasks:
            _note(
                given.out, name, trainer.finetune(name), unchanged_rows=unchanged_rows(trainer.base(), cache.path(name))
            )
            _log(began, f"{name} is trained")
    _log(began, "full fine-tunes are measured")
    if time.time() < deadline and (not given.forms or ADAPTER in given.forms):
        for name in given.tasks:
            _note(given.out, f"{name}-lora", trainer.adapter(name))
        with _measuring(given, cache, (ADAPTER,), deadline):
            pass
    _log(began, "all is measured")


def _note(out: Path, name: str, path: Path, **more: Any) -> None:
    """Write down how a model came to be."""
    _write(out, {"trained": name} | trained(path) | more)


@contextmanager
def _measuring(
    given: argparse.Namespace, cache: CheckpointCache, forms: tuple[str, ...], deadline: float
) -> Iterator[None]:
    """Measure ``forms`` beside the block and after it.

    The tasks are shared out to some processes: more hold each other up on one GPU.
    """
    workers = range(min(given.workers, len(given.tasks)))
    shares = [tuple(given.tasks[worker :: len(workers)]) for worker in workers]
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        jobs = [
            Job(share, forms, given.scale, cache.folder, given.out, Path(scratch, share[0]), given.device, deadline)
            for share in shares
        ]
        # Daemons: they end with a training that fails.
        running = [get_context("spawn").Process(target=measure, args=(job,), daemon=True) for job in jobs]
        for process in running:
            process.start()
        yield
        _join(running)


def machine(device: str) -> dict[str, Any]:
    """What the numbers were taken with."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
    }


def _prepare(cache: CheckpointCache, scale: Scale, processes: int) -> None:
    """Read text and make examples, unless that was done before."""
    cache.get("data", lambda folder: prepare(folder, scale, processes))


def _sources() -> str:
    """Names the code that the models follow from."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in SOURCES)).hexdigest()[:12]


def _join(processes: Sequence[SpawnProcess]) -> None:
    """Wait for all; exit when one failed, whose traceback is on stderr."""
    for process in processes:
        process.join()
    failed = [process.name for process in processes if process.exitcode]
    if failed:
        sys.exit(f"{', '.join(failed)} failed")


def _write(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as out:
        out.write(json.dumps(row) + "\n")


def _log(began: float, what: str) -> None:
    print(f"{time.time() - began:6.1f} s  {what}", flush=True)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cache", type=Path, required=True, help="folder for text and trained models")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--scratch", type=Path, help="folder for artifacts while they are measured")
    parser.add_argument("--deadline-s", type=float, default=3600, help="begin nothing that would not be done by then")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--forms", nargs="*", help="only these, in this order")
    parser.add_argument("--workers", type=int, default=2, help="processes that measure")
    parser.add_argument("--processes", type=int, default=8, help="that prepare data")
    parser.add_argument("--commit", default="unknown", help="of the code, for the record")
    parser.add_argument("--compile", action="store_true", help="compile the layers for training")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
