"""The manifest of one version: what a delta consists of, and nothing executable.

A version's name is the sha256 of its manifest's canonical bytes, so a manifest never names itself.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from deltazip_ray.errors import ManifestInvalid

FORMAT_VERSION = 1
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
CodecName = Literal["int4", "int2", "sparse24_int4", "raw"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Part):
    """How one weight of the delta is coded.

    ``codec`` other than ``raw`` codes the difference fine-tune − base of a matrix ``[out, in]``.
    ``raw`` holds the fine-tune's own values (norms, biases, added rows): they replace the base's.
    """

    codec: CodecName
    shape: tuple[int, ...]
    bytes_finetuned: int = Field(ge=0, description="size of the weight in the fine-tuned checkpoint")
    relative_error: float | None = Field(None, ge=0, description="output error on calibration inputs, relative")


class BlobEntry(_Part):
    """One content-addressed safetensors file: a decoder block, or ``outer`` (embeddings, final norm, head)."""

    block: str = Field(pattern=r"^(outer|layers\.\d+)$")
    digest: Digest
    size: int = Field(gt=0)
    tensors: dict[str, TensorEntry]


class FileEntry(_Part):
    """A small file that travels with the version: tokenizer, chat template, generation defaults."""

    digest: Digest
    size: int = Field(ge=0)


class BaseRef(_Part):
    """The base a delta belongs to. ``digest`` is that of ``base_digest`` over the checkpoint."""

    digest: Digest
    architecture: str
    vocab_size: int = Field(ge=1)


class Quality(_Part):
    """What the compression cost, measured on the calibration or held-out set named in ``data``."""

    data: str
    block_errors: dict[str, float] = Field(description="relative output error of each decoder block, all before it compressed")
    kl_divergence: float | None = Field(None, description="mean KL(fine-tune ‖ reconstruction) per token, in nats")


class Manifest(_Part):
    """Everything about a version but its name."""

    format_version: Literal[1] = FORMAT_VERSION
    layout_version: int = Field(ge=1, description="version of the packed layout inside the blobs")
    base: BaseRef
    added_tokens: int = Field(0, ge=0, description="rows beyond the base's vocabulary")
    bytes_finetuned: int = Field(ge=0, description="size of the whole fine-tuned checkpoint's weights")
    blobs: tuple[BlobEntry, ...]
    files: dict[FileName, FileEntry] = {}
    quality: Quality | None = None

    @property
    def bytes_artifact(self) -> int:
        """Bytes of all blobs: what is stored, and what a slot holds."""
        return sum(blob.size for blob in self.blobs)

    @property
    def added_from(self) -> int:
        """The first token id that this version adds to the base's vocabulary."""
        return self.base.vocab_size

    def canonical(self) -> bytes:
        """The bytes whose sha256 names the version."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def version(self) -> str:
        """The version's name: sha256 of :meth:`canonical`, in hex."""
        return hashlib.sha256(self.canonical()).hexdigest()


def parse_manifest(raw: bytes, version: str | None = None) -> Manifest:
    """Parse and check a manifest's bytes; with ``version``, also that they have that digest.

    Raises ManifestInvalid.
    """
    if version is not None and hashlib.sha256(raw).hexdigest() != version:
        raise ManifestInvalid(f"the manifest of version {version[:12]} has another digest: publish the version again")
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise ManifestInvalid(f"not a manifest of format {FORMAT_VERSION}: {first['loc']}: {first['msg']}") from error
    blocks = [blob.block for blob in manifest.blobs]
    if len(set(blocks)) != len(blocks):
        raise ManifestInvalid("the manifest names a block twice")
    return manifest
