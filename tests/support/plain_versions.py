"""Versions whose blobs are any bytes: for tests of what moves blobs and never looks into them."""

from collections.abc import Mapping

from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.lossless import encode
from deltazip_ray.artifact.manifest import BaseRef, BlobEntry, Manifest, TensorEntry

BASE = "b" * 64


def make_manifest(blobs: Mapping[str, bytes], *, compress: bool = False) -> Manifest:
    """A manifest of these blobs, by block. ``compress``: those for which it pays lie compressed in the store."""
    return Manifest(
        layout_version=1,
        base=BaseRef(digest=BASE, architecture="LlamaForCausalLM", vocab_size=1),
        bytes_finetuned=0,
        blobs=tuple(_entry(block, data, compress) for block, data in blobs.items()),
    )


def put_version(catalog: Catalog, blobs: Mapping[str, bytes], *, compress: bool = False) -> str:
    """Put a version into a catalog's store, without a name; returns the version."""
    manifest = make_manifest(blobs, compress=compress)
    for entry in manifest.blobs:
        data = blobs[entry.block]
        catalog.store.put(catalog.blob_key(entry.object_digest), data if entry.stored_as is None else encode(data)[0])
    put_manifest(catalog, manifest)
    return manifest.version()


def put_manifest(catalog: Catalog, manifest: Manifest) -> str:
    """Put a manifest, whatever it says; returns its version."""
    catalog.store.put(f"{catalog.base_digest}/versions/{manifest.version()}.json", manifest.canonical())
    return manifest.version()


def _entry(block: str, data: bytes, compress: bool) -> BlobEntry:
    weight = "model.norm.weight" if block == "outer" else f"model.{block}.input_layernorm.weight"
    tensors = {weight: TensorEntry(codec="raw", shape=(1,), bytes_finetuned=0)}
    stored_as = encode(data)[1] if compress else None
    return BlobEntry(block=block, digest=sha256_hex(data), size=len(data), tensors=tensors, stored_as=stored_as)
