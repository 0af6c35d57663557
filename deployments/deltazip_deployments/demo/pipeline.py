"""The stages of the demo: train, check, compress and publish, serve, send."""

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deltazip_deployments import serving
from deltazip_deployments.demo import training
from deltazip_deployments.demo.checkpoints import CheckpointCache
from deltazip_deployments.demo.config import DemoConfig
from deltazip_deployments.demo.evaluation import MAX_ANSWER_TOKENS, Answers, Judge
from deltazip_deployments.demo.stages import Stages
from deltazip_deployments.demo.tasks import TASKS, Example
from deltazip_deployments.demo.traffic import make_trace, send
from deltazip_loadgen import Record
from deltazip_ray.artifact.artifact import open_artifact
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.artifact.store import open_store
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.config import MIB, AppConfig, EngineConfig, NodeStoreConfig, StoreConfig

BASE = "base"
LOOPBACK = "127.0.0.1"
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("corpus.py", "tasks.py", "tokenizer.py", "training.py"))
"""The code that trained models depend on, besides the recipe."""

Questions = Mapping[str, Sequence[Example]]
"""Held-out questions by model, the base included."""


@dataclass(frozen=True)
class Checkpoints:
    """Folders of Hugging Face checkpoints."""

    base: Path
    variants: Mapping[str, Path]


@dataclass(frozen=True)
class Verdict:
    """The answers under ``transformers`` to a variant's questions, without an instruction."""

    base: Answers
    finetuned: Answers


def train(config: DemoConfig, cache: Path, stages: Stages) -> Checkpoints:
    """Train the models that are not in the cache."""
    recipe = config.recipe
    kept = CheckpointCache(cache, recipe.key(_SOURCES))
    with stages.stage("train base", recipe.pretrain.steps) as bar:
        base = kept.get(BASE, partial(training.train_base, recipe, advance=bar.advance))
    variants = {}
    for task in TASKS:
        with stages.stage(f"fine-tune {task.name}", recipe.finetune.steps) as bar:
            make = partial(training.finetune, recipe, task, base, advance=bar.advance)
            variants[task.name] = kept.get(task.name, make)
    return Checkpoints(base, variants)


def held_out(config: DemoConfig) -> Questions:
    """The questions for the models. The base's own task is to repeat its input."""
    asked = {task.name: task.held_out(config.seed, config.questions) for task in TASKS}
    return {BASE: [Example(example.question, example.question) for example in asked[TASKS[0].name]]} | asked


def check(checkpoints: Checkpoints, questions: Questions, stages: Stages) -> dict[str, Verdict]:
    """Answer each variant's questions with the base and the fine-tune, under ``transformers``."""
    verdicts = {}
    total = 2 * sum(len(questions[name]) for name in checkpoints.variants)
    with stages.stage("check under transformers", total) as bar:
        base = Judge(checkpoints.base)
        for name, path in checkpoints.variants.items():
            inputs = [example.question for example in questions[name]]
            verdicts[name] = Verdict(base.answers(inputs, bar.advance), Judge(path).answers(inputs, bar.advance))
    return verdicts


def compress(config: DemoConfig, checkpoints: Checkpoints, folder: Path, stages: Stages) -> dict[str, Manifest]:
    """Compress the fine-tunes to artifacts in ``folder``, calibrated on examples of their training."""
    manifests = {}
    for task in TASKS:
        chats = folder / f"{task.name}.jsonl"
        chats.write_text("".join(map(_chat, task.training(config.seed, config.calibration_samples))))
        options = CompressOptions(codec=config.codec, calibration=chats, samples=config.calibration_samples)
        out = (folder / task.name).as_uri()
        with stages.stage(f"compress {task.name}", 1.0) as bar:
            finetuned = checkpoints.variants[task.name]
            manifests[task.name] = compress_checkpoint(checkpoints.base, finetuned, out, options, progress=bar.reach)
    return manifests


def publish(folder: Path, names: Sequence[str], store: StoreConfig, stages: Stages) -> None:
    """Publish the artifacts in ``folder`` under their names."""
    artifacts = {name: open_artifact(folder / name) for name in names}
    with stages.stage("publish", sum(manifest.bytes_stored for manifest, _ in artifacts.values())) as bar:
        for name, (manifest, source) in artifacts.items():
            Catalog(open_store(store), manifest.base.digest).publish(source, manifest, name, progress=bar.advance)


@contextmanager
def served(config: DemoConfig, base: Path, store: StoreConfig, port: int | None, stages: Stages) -> Iterator[str]:
    """Run the application during the block, on a free port if none is given; yields its URL."""
    app = AppConfig(
        base=str(base),
        base_name=BASE,
        store=store,
        replicas=config.replicas,
        engine=EngineConfig(
            max_model_len=training.MAX_POSITIONS, max_batch_tokens=256, kv_blocks=512, slots=config.slots, threads=1
        ),
        node_store=NodeStoreConfig(arena_bytes=16 * MIB),
    )
    with ExitStack() as stack:
        with stages.stage("start the application"):
            url = stack.enter_context(serving.running(app, LOOPBACK, port or _free_port()))
        yield url
        with stages.stage("stop the application"):
            stack.close()


def ask(config: DemoConfig, questions: Questions, url: str, folder: Path, stages: Stages) -> list[Record]:
    """Make a trace in ``folder`` and replay it."""
    trace = make_trace(
        folder,
        questions,
        base_name=BASE,
        max_tokens=MAX_ANSWER_TOKENS,
        requests=config.requests,
        rate=config.rate,
        seed=config.seed,
    )
    with stages.stage("replay the trace", config.requests) as bar:
        return send(trace, url, bar.advance)


def _chat(example: Example) -> str:
    """One line of a calibration file."""
    messages = [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.answer}]
    return json.dumps({"messages": messages}) + "\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
