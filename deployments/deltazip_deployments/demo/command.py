"""``deltazip demo``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from deltazip_ray.config import MatrixCodec
from deltazip_ray.errors import ConfigError


def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the server up until Ctrl-C, and show how to ask it.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this file.", dir_okay=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port on 127.0.0.1; a free one by default.")
    ] = None,
    codec: Annotated[
        MatrixCodec | None,
        typer.Option(help="Codec of the deltas' matrices; int4 keeps more, int1 less.", show_default="int2"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for the trained models; the user's cache folder by default.", file_okay=False),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Other sizes and rates: a JSON file with fields of DemoConfig.", hidden=True)
    ] = None,
) -> None:
    """Train, compress, publish, serve and ask: all of it on this machine, in minutes.

    Trains a tiny base model and five full-parameter fine-tunes (kept in a cache for the next time), compresses each
    to a delta, serves all of them from the one base, sends bursty traffic over HTTP, and compares speed and answers
    with the fine-tunes' own.

    Example: deltazip demo --keep
    """
    if json is not None and not json.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {json}: the folder {json.parent} does not exist; create it first")
    # Only effective before torch is loaded. By default OpenMP threads spin while they wait, which makes training ten
    # times slower if other programs use the cores, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported here, as torch, transformers and ray take seconds, which `deltazip --help` should not.
    from deltazip_deployments.demo.checkpoints import default_cache
    from deltazip_deployments.demo.config import load_config
    from deltazip_deployments.demo.run import run

    run(load_config(config, codec), cache or default_cache(), port=port, keep=keep, json=json)
