"""Stores with small published variants: real artifacts, made of a few raw values and a real tokenizer."""

from pathlib import Path

import torch

from deltazip_ray.artifact.artifact import ArtifactWriter
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.manifest import BaseRef, TensorEntry
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import StoreConfig
from tests.support.tiny import make_tokenizer

BASE_DIGEST = "b" * 64


def save_base_files(folder: Path) -> Path:
    """The tokenizer files of a base, which is all of it that a router reads."""
    make_tokenizer().save_pretrained(folder)
    return folder


def publish(
    store: StoreConfig,
    scratch: Path,
    name: str,
    *,
    seed: int = 0,
    template: str | None = None,
    aliases: tuple[str, ...] = ("latest",),
    size: int = 64,
) -> str:
    """Publish a variant whose blobs are noise of ``seed``; returns the version. ``scratch`` is any folder."""
    scratch = scratch / f"{name}-{seed}"
    writer = ArtifactWriter(open_store(StoreConfig(url=scratch.as_uri())))
    generator = torch.Generator().manual_seed(seed)
    for block in ("layers.0", "outer"):
        weight = f"model.{block}.norm.weight" if block != "outer" else "model.norm.weight"
        values = torch.randn(size, generator=generator)
        entry = TensorEntry(codec="raw", shape=(size,), bytes_finetuned=4 * size)
        writer.add_blob(block, {weight: values}, {weight: entry})
    tokenizer = make_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(scratch / "tokenizer")
    for file in sorted((scratch / "tokenizer").iterdir()):
        writer.add_file(file.name, file.read_bytes())
    base = BaseRef(digest=BASE_DIGEST, architecture="LlamaForCausalLM", vocab_size=len(tokenizer))
    manifest = writer.finish(layout_version=1, base=base, bytes_finetuned=8 * size)
    catalog = Catalog(open_store(store), BASE_DIGEST)
    catalog.publish(open_store(StoreConfig(url=scratch.as_uri())), manifest, name, aliases)
    return manifest.version()
