"""``deltazip inspect``: what is in an artifact."""

from collections import Counter
from math import prod
from typing import Annotated, Any

import typer

from deltazip_ray.artifact.manifest import BlobEntry, Manifest, Quality
from deltazip_ray.cli.console import (
    EndpointUrl,
    Json,
    PathStyle,
    byte_progress,
    out,
    print_json,
    size,
    table,
)
from deltazip_ray.config import StoreConfig


def inspect(
    artifact: Annotated[str, typer.Argument(help="Folder or s3:// prefix that `deltazip compress` wrote.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every blob and check its digest and contents.")
    ] = False,
    as_json: Json = False,
    endpoint_url: EndpointUrl = None,
    path_style: PathStyle = False,
) -> None:
    """Show an artifact's sizes, codecs, quality and digests.

    Example: deltazip inspect ./sorter-delta --verify
    """
    from deltazip_ray.artifact.artifact import open_artifact, verify_artifact

    manifest, store = open_artifact(StoreConfig.at(artifact, endpoint_url, path_style))
    if verify:
        with byte_progress("Verifying", manifest.bytes_stored) as advance:
            verify_artifact(manifest, store, advance)
    if as_json:
        print_json(summary(manifest))
        return
    show(manifest)
    if verify:
        out.print("All digests match.", style="green")


def summary(manifest: Manifest) -> dict[str, Any]:
    """An artifact for scripts: the manifest, with the version's name and sums."""
    return {
        "version": manifest.version(),
        "bytes_artifact": manifest.bytes_artifact,
        "bytes_stored": manifest.bytes_stored,
        "ratio": _ratio(manifest.bytes_finetuned, manifest.bytes_artifact),
        "bits": {blob.block: round(bits(blob), 3) for blob in manifest.blobs},
        **manifest.model_dump(mode="json"),
    }


def _ratio(before: int, after: int) -> float | None:
    return round(before / after, 2) if after else None


def bits(blob: BlobEntry) -> float:
    """Bits that a blob takes for each weight in it; what did not change is not in it."""
    return 8 * blob.size / sum(prod(entry.shape) for entry in blob.tensors.values())


def show(manifest: Manifest) -> None:
    """An artifact for people."""
    ratio = _ratio(manifest.bytes_finetuned, manifest.bytes_artifact)
    out.print(f"version  {manifest.version()}")
    out.print(f"base     {manifest.base.digest}  {manifest.base.architecture}, {manifest.base.vocab_size} tokens")
    out.print(
        f"size     {size(manifest.bytes_finetuned)} fine-tuned → {size(manifest.bytes_artifact)} delta"
        + (f", {ratio} × smaller" if ratio else ", no weight differs from the base")
    )
    out.print(f"stored   {size(manifest.bytes_stored)} with its files, compressed without loss where that pays")
    if manifest.added_tokens:
        out.print(f"tokens   {manifest.added_tokens} added to the base's vocabulary")
    if manifest.quality:
        _show_quality(manifest.quality)
        for name, score in sorted(manifest.quality.scores.items()):
            out.print(f"         {name} {score:.4f}")
    errors = manifest.quality.block_errors if manifest.quality else {}
    table(
        "", ("block", "codecs", "bits", "before", "after", "error", "digest"), [_row(b, errors) for b in manifest.blobs]
    )
    if manifest.files:
        table("", ("file", "size", "digest"), [(n, size(f.size), f.digest[:12]) for n, f in manifest.files.items()])


def _show_quality(quality: Quality) -> None:
    kl, base = quality.kl_divergence, quality.base_kl_divergence
    if kl is None:
        out.print("quality  no KL")
        return
    compared = "" if base is None else f" (of the base: {base:.2e})"
    out.print(f"quality  KL {kl:.2e} nats a token{compared}, on {quality.data}")
    if quality.perplexities:
        found = [f"{value:.4g} ({name})" for name, value in sorted(quality.perplexities.items(), reverse=True)]
        out.print(f"         perplexity {', '.join(found)}")


def _row(blob: BlobEntry, errors: dict[str, float]) -> tuple[str, ...]:
    counts = Counter(entry.codec for entry in blob.tensors.values())
    codecs = ", ".join(f"{count} × {codec}" for codec, count in sorted(counts.items()))
    before = sum(entry.bytes_finetuned for entry in blob.tensors.values())
    error = f"{errors[blob.block]:.2%}" if blob.block in errors else "–"
    return blob.block, codecs, f"{bits(blob):.2f}", size(before), size(blob.size), error, blob.digest[:12]
