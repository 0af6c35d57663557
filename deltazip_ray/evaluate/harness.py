"""Runs tasks of lm-eval and collects their scores."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltazip_ray.errors import ConfigError
from deltazip_ray.evaluate.subjects import Model

SHOWN = 5
RESAMPLES = 1000
"""Bootstrap resamples for the errors of metrics that are not means."""


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    name: str
    """``task:metric``, and ``:filter`` if the task filters answers."""
    value: float
    error: float | None
    """Standard error, if lm-eval computes one."""
    samples: int


@dataclass(frozen=True)
class Suite:
    """Which tasks to run, and how."""

    tasks: tuple[str, ...]
    include: Path | None = None
    """A folder with the user's own task files."""
    limit: int | None = None
    """Maximum samples per task."""
    fewshot: int | None = None
    """Examples before each question; None: the task's default."""
    batch: int = 8
    chat: bool = False
    """Ask in the model's chat template."""


def run_tasks(model: Model, suite: Suite) -> tuple[Score, ...]:
    """Score ``model``; lm-eval shows its progress on stderr.

    Raises ConfigError when lm-eval is not installed, does not know a task, cannot read its data, or cannot score it
    with this kind of model.
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
        # Missing data and servers that do not answer are OSErrors; lm-eval asserts that it supports a request.
        raise ConfigError(
            f"lm-eval could not score {', '.join(suite.tasks)}: {str(error) or type(error).__name__}. Without a "
            "network give task files with local data (--include); tasks that do not generate need --tokenizer on a "
            "server"
        ) from error
    return tuple(scores_of(found["results"], found["n-samples"]))


def scores_of(results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Mapping[str, int]]) -> Sequence[Score]:
    """The numbers in lm-eval's results, sorted by task and metric."""
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
    """lm-eval's index of tasks. Raises ConfigError for an unknown task."""
    # Reading the thousands of task files of lm-eval takes seconds, so it is avoided if the user's own are enough.
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
