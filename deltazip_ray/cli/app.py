"""The core's part of the ``deltazip`` command."""

from importlib.metadata import version
from typing import Annotated

import typer

from deltazip_ray.cli.compress import compress
from deltazip_ray.cli.evaluate import evaluate
from deltazip_ray.cli.inspect import inspect
from deltazip_ray.cli.merge import merge
from deltazip_ray.cli.publish import publish
from deltazip_ray.cli.settings import settings
from deltazip_ray.cli.variants import variants

app = typer.Typer(
    name="deltazip",
    help="Serve many full-parameter fine-tunes of one base model from the same GPUs.\n\n"
    "A fine-tune becomes a compressed delta (compress), goes to a store under a name (publish, variants) "
    "and is served beside all others from one base (serve). `deltazip demo` shows all of it in minutes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deltazip {version('deltazip-ray')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


app.command()(compress)
app.command("eval")(evaluate)
app.command()(inspect)
app.command()(merge)
app.command()(publish)
app.add_typer(variants, name="variants")
app.command()(settings)
