"""``deltazip eval``: task scores of a checkpoint, an artifact or a running server."""

import logging
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltazip_ray.cli.console import (
    Device,
    EndpointUrl,
    Json,
    PathStyle,
    fraction_progress,
    out,
    print_json,
    table,
)
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deltazip_ray.evaluate.subjects import Model


def _there(subject: str) -> str:
    """Checked before options are missed: the first thing wrong is told first."""
    if "://" not in subject and not Path(subject).expanduser().is_dir():
        raise typer.BadParameter(f"there is no folder {subject}")
    return subject


Subject = Annotated[
    str,
    typer.Argument(
        help="A checkpoint's folder, an artifact (folder or s3:// prefix), or a server's URL up to /v1.",
        callback=_there,
    ),
]
Tasks = Annotated[str, typer.Option(help="Tasks of lm-eval, with commas between them.")]
Include = Annotated[
    Path | None, typer.Option(help="Folder with task files of your own (lm-eval's YAML).", exists=True, file_okay=False)
]
Base = Annotated[
    Path | None, typer.Option(help="The base checkpoint's folder, for an artifact.", exists=True, file_okay=False)
]
Name = Annotated[str | None, typer.Option("--model", help="The variant to ask for, on a server.")]
Tokenizer = Annotated[
    Path | None,
    typer.Option(help="Folder with its tokenizer; on a server, for tasks that do not generate.", exists=True),
]
Record = Annotated[
    bool,
    typer.Option(
        "--record",
        help="Write the scores into the artifact, where `publish --require task:metric>0.9` reads them.",
    ),
]


def evaluate(
    subject: Subject,
    tasks: Tasks,
    include: Include = None,
    base: Base = None,
    model: Name = None,
    tokenizer: Tokenizer = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each task at most.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question, if not the task's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time, where the model runs here.")] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    device: Device = "cpu",
    record: Record = False,
    as_json: Json = False,
    endpoint_url: EndpointUrl = None,
    path_style: PathStyle = False,
) -> None:
    """Score a model on tasks of the lm-eval harness, which comes with the extra `eval`.

    An artifact is merged with its base into a temporary folder. A server answers through its OpenAI API; its key is
    taken from OPENAI_API_KEY.

    Example: deltazip eval ./sorter-delta --base ./llama-base --tasks sort --include ./tasks --record
    """
    from deltazip_ray.artifact.artifact import open_artifact
    from deltazip_ray.evaluate.harness import Suite, run_tasks
    from deltazip_ray.evaluate.record import record_scores

    suite = Suite(tuple(filter(None, tasks.split(","))), include, limit, fewshot, batch, chat)
    place = _artifact(subject, endpoint_url, path_style)
    if record and place is None:
        raise ConfigError("--record writes into an artifact: give one")
    version = None if place is None else open_artifact(place)[0].version()
    with _opened(subject, place, base, model, tokenizer, chat, device) as scored:
        scores = run_tasks(scored, suite)
    if record and place is not None and version is not None:
        version = record_scores(place, version, scores).version()
    if as_json:
        print_json({"subject": subject, "version": version, "scores": [asdict(score) for score in scores]})
        return
    rows = [
        (score.name, f"{score.value:.4f}", f"± {score.error:.4f}" if score.error else "", str(score.samples))
        for score in scores
    ]
    table(subject, ("task", "score", "error", "samples"), rows)
    if record:
        out.print(f"Recorded. The artifact is now version {version}.")


def _artifact(subject: str, endpoint_url: str | None, path_style: bool) -> StoreConfig | None:
    """Where the artifact is, if ``subject`` is one."""
    folder = Path(subject)
    if subject.startswith(("http://", "https://")) or (folder / "config.json").is_file():
        return None
    return StoreConfig.at(subject, endpoint_url, path_style)


def _opened(
    subject: str,
    place: StoreConfig | None,
    base: Path | None,
    name: str | None,
    tokenizer: Path | None,
    chat: bool,
    device: str,
) -> "AbstractContextManager[Model]":
    from deltazip_ray.evaluate.subjects import of_checkpoint, of_endpoint

    if place is not None:
        if base is None:
            raise ConfigError("an artifact is a difference: give its base with --base")
        return _merged(base, place, device)
    if subject.startswith(("http://", "https://")):
        if name is None:
            raise ConfigError("a server has many models: name one with --model")
        # When one request has failed the harness lets go of the others, and asyncio would print the trace of each.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        return nullcontext(of_endpoint(subject, name, chat=chat, tokenizer=tokenizer))
    return nullcontext(of_checkpoint(Path(subject), device))


@contextmanager
def _merged(base: Path, artifact: StoreConfig, device: str) -> "Iterator[Model]":
    """The merged artifact; the bar is gone before the harness shows its own."""
    from deltazip_ray.evaluate.subjects import of_artifact

    with ExitStack() as stack:
        with fraction_progress() as advance:
            model = stack.enter_context(of_artifact(base, artifact, device, advance))
        yield model
