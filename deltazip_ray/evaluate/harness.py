"""Runs tasks of the harness and reads off their scores."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltazip_ray.errors import ConfigError
from deltazip_ray.evaluate.subjects import Model

SHOWN = 5
RESAMPLES = 1000
"""Bootstrap resamples for the errors of metrics that are no means."""


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    name: str
    """``task:metric``, and ``:filter`` where the task filters answers."""
    value: float
    error: float | None
    """Standard error; None where the harness knows none."""
    samples: int


@dataclass(frozen=True)
class Suite:
    """Which tasks to run, and how."""

    tasks: tuple[str, ...]
    include: Path | None = None
    """A folder with task files of one's own."""
    limit: int | None = None
    """Samples of each task at most."""
    fewshot: int | None = None
    """Examples in front of each question; None: as the task says."""
    batch: int = 8
    chat: bool = False
    """Questions as chats, in the model's own template."""


def run_tasks(model: Model, suite: Suite) -> tuple[Score, ...]:
    """Score ``model``; the harness shows its progress on stderr.

    Raises ConfigError when lm-eval is not installed, when it does not know a task, cannot read its data, or cannot
    score it on this kind of model.
    """
    lm_eval, tasks, aiohttp = _module("lm_eval"), _module("lm_eval.tasks"), _module("aiohttp")
    try:
        found = lm_eval.simple_evaluate(
            model=model.kind,
            model_args=dict(model.arguments),
            tasks=list(suite.tasks),
            num_fewshot=suite.fewshot,
            batch_size=1 if model.kind != "hf" else suite.batch,
            device=model.device,
            limit=suite.limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            apply_chat_template=suite.chat,
            task_manager=_manager(tasks, suite),
        )
    except (OSError, ValueError, NotImplementedError, AssertionError, aiohttp.ClientError) as error:
        # Data that is not there and servers that do not answer are OSErrors; the harness asserts what it cannot do.
        raise ConfigError(
            f"lm-eval could not score {', '.join(suite.tasks)}: {str(error) or type(error).__name__}. Without a "
            "network give task files whose data are local (--include); on a server, tasks that do not generate "
            "need --tokenizer"
        ) from error
    return tuple(scores_of(found["results"], found["n-samples"]))


def scores_of(results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Mapping[str, int]]) -> Sequence[Score]:
    """The numbers among the harness's results, by task and metric."""
    found = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, applied = key.partition(",")
            if isinstance(value, int | float) and applied and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{applied}")
                name = f"{task}:{metric}" + ("" if applied == "none" else f":{applied}")
                counted = samples.get(task, {}).get("effective", 0)
                found.append(Score(name, float(value), error if isinstance(error, float) else None, counted))
    return sorted(found, key=lambda score: score.name)


def _manager(tasks: Any, suite: Suite) -> Any:
    """The harness's index of tasks. Raises ConfigError for one that it lacks."""
    # To read the thousands of files that come with the harness takes seconds: not when one's own are enough.
    include = None if suite.include is None else str(suite.include)
    manager = tasks.TaskManager(include_path=include, include_defaults=False)
    if not set(suite.tasks) <= set(manager.all_tasks):
        manager = tasks.TaskManager(include_path=include)
    unknown = [task for task in suite.tasks if task not in manager.all_tasks]
    if unknown:
        own = ", ".join(sorted(tasks.TaskManager(include_path=include, include_defaults=False).all_tasks)[:SHOWN])
        raise ConfigError(
            f"lm-eval knows no task {unknown[0]!r}: `lm-eval ls tasks` lists its own"
            + (f", and {suite.include} has {own or 'none'}" if suite.include else "; --include names a folder of yours")
        )
    return manager


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"scores need the lm-eval harness, and {error.name} is not installed: pip install 'deltazip-ray[eval]'"
        ) from error
