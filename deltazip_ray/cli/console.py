"""What all commands share: two consoles, progress, sizes, and errors as one line with an exit code."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from deltazip_ray.errors import DeltaZipError

out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
EndpointUrl = Annotated[
    str | None, typer.Option("--endpoint-url", help="S3 endpoint, where it is not AWS.", envvar="AWS_ENDPOINT_URL_S3")
]
PathStyle = Annotated[
    bool, typer.Option("--path-style", help="Address buckets as a path, as most S3-compatible servers want.")
]


def _seen(device: str) -> str:
    if device == "cuda":
        from deltazip_ray.layers.device import check_device

        check_device(device, "--device")
    return device


Device = Annotated[
    Literal["cpu", "cuda"], typer.Option("--device", help="Where the models are computed.", callback=_seen)
]


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` bytes on stderr, silent where that is no terminal; yields what takes the bytes just done."""
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as display:
        task = display.add_task(what, total=total)
        yield lambda done: display.update(task, advance=done)


@contextmanager
def fraction_progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, silent where that is no terminal; yields what takes the activity and the fraction done."""
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as display:
        task = display.add_task("Starting", total=1.0)
        yield lambda what, done: display.update(task, description=what, completed=done)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    view = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        view.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        view.add_row(*map(escape, row))
    out.print(view)


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return decimal(count)


def print_json(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """One JSON document on stdout, plain where stdout is not a terminal."""
    out.print_json(data=data)


def run(app: Callable[[], Any]) -> None:
    """Run a typer app; our own errors become one line on stderr and exit code 1."""
    try:
        app()
    except DeltaZipError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
