"""``deltazip compress``: from two checkpoints to an artifact."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltazip_ray.cli.console import (
    Device,
    EndpointUrl,
    Json,
    PathStyle,
    err,
    fraction_progress,
    print_json,
)
from deltazip_ray.cli.inspect import show, summary
from deltazip_ray.config import MatrixCodec, StoreConfig, first_problem
from deltazip_ray.errors import ConfigError

if TYPE_CHECKING:
    from deltazip_ray.compress.options import CompressOptions


def fraction(text: str) -> float:
    """A share as people write it: ``0.5%`` or ``0.005``."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no share: write 0.5% or 0.005") from None


Base = Annotated[Path, typer.Argument(help="The base checkpoint's folder.", exists=True, file_okay=False)]
Finetuned = Annotated[
    Path, typer.Argument(help="Folder of the fine-tuned checkpoint or LoRA adapter.", exists=True, file_okay=False)
]
Out = Annotated[str, typer.Option("--out", help="Folder or s3:// prefix for the artifact.")]
OneCodec = Annotated[
    MatrixCodec | None,
    typer.Option(help="One codec for all matrices inside the decoder blocks; int4 if no target is set."),
]
TargetBits = Annotated[
    float | None,
    typer.Option(
        help="Choose each matrix's codec by what its error costs, so that changed matrices take so many bits a "
        "weight as stored. Unchanged ones take nothing.",
    ),
]
TargetRatio = Annotated[
    float | None,
    typer.Option(help="Likewise, so that all is so many times smaller than the 16-bit fine-tune, embeddings too."),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        parser=fraction,
        metavar="PERCENT",
        help="For each matrix the smallest codec whose relative output error is at most this, such as 0.5%.",
    ),
]
Require = Annotated[
    str | None, typer.Option(metavar="BOUNDS", help="Write no artifact unless, say, kl<0.05 or kl<0.05,block<2%.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|hf:NAME[:CONFIG]",
        help="A text file, chats as JSON lines ({'messages': […]}), or a Hugging Face dataset of either. "
        "Without one, the fine-tune itself writes the sequences: no data needed, somewhat less accurate.",
    ),
]
HUB = "hf:"
_EXACT = ("raw", "low_rank")
"""Codecs that look at no data."""
_SAMPLED = (
    "note: no --calibration, so the fine-tune wrote its own. On the demo's fine-tunes that cost 1.1 to 4 times the KL "
    "divergence that chats of their training would have (docs/compression.md)."
)


def compress(
    base: Base,
    finetuned: Finetuned,
    to: Out,
    codec: OneCodec = None,
    target_bits: TargetBits = None,
    target_ratio: TargetRatio = None,
    max_error: MaxError = None,
    require: Require = None,
    calibration: Calibration = None,
    samples: Annotated[int, typer.Option(min=2, help="Calibration sequences.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of a calibration sequence at most.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal versions.")] = 0,
    device: Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that --out holds already.")] = False,
    as_json: Json = False,
    endpoint_url: EndpointUrl = None,
    path_style: PathStyle = False,
) -> None:
    """Compress a fine-tune of all parameters, or a LoRA adapter, to a delta against its base.

    Reads safetensors checkpoints block by block, and writes manifest.json and content-addressed blobs. Both
    checkpoints must have one architecture; the fine-tune may add tokens. An adapter is a folder in PEFT's format.

    Example: deltazip compress ./llama-base ./llama-sorter --out ./sorter-delta --target-ratio 8
    """
    from deltazip_ray.compress.pipeline import compress_checkpoint

    goals = {"codec": codec, "target_bits": target_bits, "target_ratio": target_ratio, "max_error": max_error}
    options = _options(
        {name: value for name, value in goals.items() if value is not None},
        require=require,
        **_source(calibration),
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        device=device,
    )
    with fraction_progress() as advance:
        where = StoreConfig.at(to, endpoint_url, path_style)
        manifest = compress_checkpoint(base, finetuned, where, options, advance, replace=force)
    if calibration is None and any(
        entry.codec not in _EXACT for blob in manifest.blobs for entry in blob.tensors.values()
    ):
        err.print(_SAMPLED, style="yellow")
    if as_json:
        print_json(summary(manifest))
    else:
        show(manifest)


def _source(calibration: str | None) -> dict[str, Any]:
    """The option that names the calibration data."""
    if calibration is not None and calibration.startswith(HUB):
        return {"dataset": calibration.removeprefix(HUB)}
    if calibration is not None and not Path(calibration).is_file():
        raise ConfigError(f"--calibration {calibration} is no file: datasets are written as hf:NAME or hf:NAME:CONFIG")
    return {"calibration": calibration}


def _options(goals: dict[str, Any], **others: Any) -> "CompressOptions":
    """The settings; raises ConfigError when they contradict each other."""
    from pydantic import ValidationError

    from deltazip_ray.compress.options import CompressOptions

    try:
        return CompressOptions(**goals, **others)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from error
