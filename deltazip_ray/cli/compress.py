"""``deltazip compress``: from two checkpoints to an artifact."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from deltazip_ray.cli.console import EndpointUrl, Json, PathStyle, fraction_progress, print_json, store_config
from deltazip_ray.cli.inspect import show, summary


class Codec(StrEnum):
    """How a weight matrix is coded; bits a weight include the scales."""

    INT4 = "int4"
    INT3 = "int3"
    INT2 = "int2"
    INT1 = "int1"
    SPARSE24_INT4 = "sparse24_int4"
    SPARSE24_INT2 = "sparse24_int2"


def compress(
    base: Annotated[Path, typer.Argument(help="The base checkpoint's folder.", exists=True, file_okay=False)],
    finetuned: Annotated[
        Path, typer.Argument(help="The fine-tuned checkpoint's folder.", exists=True, file_okay=False)
    ],
    to: Annotated[str, typer.Option("--out", help="Folder or s3:// prefix for the artifact.")],
    codec: Annotated[Codec, typer.Option(help="Codec of the matrices inside the decoder blocks.")] = Codec.INT4,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A text file, or chats as JSON lines ({'messages': […]}). "
            "Without one, the fine-tune itself writes the sequences: no data needed, somewhat less accurate.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Calibration sequences.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of a calibration sequence at most.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal versions.")] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to compute.")] = "cpu",
    as_json: Json = False,
    endpoint_url: EndpointUrl = None,
    path_style: PathStyle = False,
) -> None:
    """Compress a full-parameter fine-tune to a delta against its base.

    Reads safetensors checkpoints block by block, and writes manifest.json and content-addressed blobs. Both
    checkpoints must have one architecture; the fine-tune may add tokens.

    Example: deltazip compress ./llama-base ./llama-sorter --out ./sorter-delta --codec int2
    """
    from deltazip_ray.compress.options import CompressOptions
    from deltazip_ray.compress.pipeline import compress_checkpoint

    options = CompressOptions(
        codec=codec.value,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        device=device,
    )
    with fraction_progress() as advance:
        manifest = compress_checkpoint(
            base, finetuned, store_config(to, endpoint_url, path_style), options, progress=advance
        )
    if as_json:
        print_json(summary(manifest))
    else:
        show(manifest)
