"""``deltazip merge``: from base and delta back to a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from deltazip_ray.cli.console import EndpointUrl, PathStyle, fraction_progress, out
from deltazip_ray.config import Dtype, StoreConfig


def merge(
    base: Annotated[Path, typer.Argument(help="The base checkpoint's folder.", exists=True, file_okay=False)],
    artifact: Annotated[str, typer.Argument(help="Folder or s3:// prefix that `deltazip compress` wrote.")],
    to: Annotated[Path, typer.Option("--out", help="New folder for the checkpoint.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Default: that of the fine-tune.")] = None,
    endpoint_url: EndpointUrl = None,
    path_style: PathStyle = False,
) -> None:
    """Write base + delta as a Hugging Face checkpoint: what the server computes with, for any other tool.

    Example: deltazip merge ./base ./sorter-delta --out ./sorter-merged
    """
    import torch

    from deltazip_ray.compress.merge import merge as write_checkpoint

    config = StoreConfig.at(artifact, endpoint_url, path_style)
    with fraction_progress() as advance:
        write_checkpoint(base, config, to, getattr(torch, dtype) if dtype else None, advance)
    out.print(f"Wrote {to}. Load it with transformers: AutoModelForCausalLM.from_pretrained({str(to)!r})")
