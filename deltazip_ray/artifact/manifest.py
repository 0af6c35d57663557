"""The manifest of one version: what a delta consists of. Plain data, nothing executable.

A version's name is the sha256 of its manifest's canonical bytes, so a manifest never names itself.
"""

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from deltazip_ray.artifact.names import check_digest
from deltazip_ray.config import CodecName, first_problem
from deltazip_ray.errors import ManifestInvalid

FORMAT_VERSION: Literal[1] = 1
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
WeightName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,31}$", max_length=200)]
Dimension = Annotated[int, Field(gt=0, lt=1 << 31)]
Size = Annotated[int, Field(ge=0, lt=1 << 63)]
MAX_MANIFEST = 64 << 20
MAX_FILE = 256 << 20
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "added_tokens.json",
)
"""Files of a checkpoint that travel with a version, if they exist."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorEntry(_Part):
    """How one weight of the delta is coded.

    ``codec`` other than ``raw`` codes the difference fine-tune − base of a matrix ``[out, in]``; ``low_rank`` as the
    product of ``up`` ``[out, rank]`` and ``down`` ``[rank, in]``.
    ``raw`` holds the fine-tune's own values (norms, biases, added rows): they replace the base's.
    """

    codec: CodecName
    shape: Annotated[tuple[Dimension, ...], Field(max_length=8)]
    bytes_finetuned: Size = Field(description="size of the weight in the fine-tuned checkpoint")
    relative_error: float | None = Field(None, ge=0, description="output error on calibration inputs, relative")
    rank: int | None = Field(None, ge=1, le=128, description="of low_rank, and of nothing else")

    @model_validator(mode="after")
    def _codes_are_matrices(self) -> Self:
        if self.codec != "raw" and len(self.shape) != 2:
            raise ValueError(f"codec {self.codec} codes matrices, not shape {self.shape}")
        if (self.codec == "low_rank") != (self.rank is not None):
            raise ValueError("rank is for low_rank weights only, which need one")
        return self


class StoredForm(_Part):
    """A blob's form in a store, if it differs from the one in memory."""

    encoding: Literal["zstd"]
    digest: Digest = Field(description="of the stored bytes: the object's name")
    size: Size = Field(gt=0)


class BlobEntry(_Part):
    """One content-addressed safetensors file: a decoder block, or ``outer`` (embeddings, final norm, head)."""

    block: str = Field(pattern=r"^(outer|layers\.(0|[1-9][0-9]{0,4}))$")
    digest: Digest
    size: Size = Field(gt=0)
    tensors: dict[WeightName, TensorEntry] = Field(min_length=1)
    stored_as: StoredForm | None = Field(None, description="digest and size are those of the bytes in memory")

    @property
    def object_digest(self) -> str:
        """Names the object in a store."""
        return self.digest if self.stored_as is None else self.stored_as.digest

    @property
    def object_size(self) -> int:
        """Bytes of the object in a store."""
        return self.size if self.stored_as is None else self.stored_as.size

    @model_validator(mode="after")
    def _stored_form_is_smaller(self) -> Self:
        if self.object_size > self.size:
            raise ValueError(f"block {self.block} is larger when it is compressed")
        return self

    @model_validator(mode="after")
    def _weights_belong_here(self) -> Self:
        for weight, tensor in self.tensors.items():
            home = re.match(r"[a-z_]+\.(layers\.[0-9]+)\.", weight)
            if (home.group(1) if home else "outer") != self.block:
                raise ValueError(f"{weight} does not belong to block {self.block}")
            # In a blob "<weight>.codes" is a part of "<weight>", so no other weight may have that name.
            parts = {f"{weight}.{part}" for part in ("codes", "low", "scales", "index", "down", "up")}
            if tensor.codec != "raw" and parts & self.tensors.keys():
                raise ValueError(f"a weight has the name of a part of {weight}")
        return self


class FileEntry(_Part):
    """A small file that travels with the version: tokenizer, chat template, generation defaults."""

    digest: Digest
    size: int = Field(ge=0, le=MAX_FILE)

    @property
    def object_digest(self) -> str:
        """Names the object in a store."""
        return self.digest

    @property
    def object_size(self) -> int:
        """Bytes of the object in a store."""
        return self.size


class BaseRef(_Part):
    """The base a delta belongs to. ``digest`` is that of ``base_digest`` over the checkpoint."""

    digest: Digest
    architecture: str = Field(max_length=200)
    vocab_size: Dimension


class Quality(_Part):
    """What the compression cost, measured on the data that ``data`` describes."""

    data: str
    block_errors: dict[str, float] = Field(
        description="relative output error of each decoder block, all before it compressed"
    )
    kl_divergence: float | None = Field(None, description="mean KL(fine-tune ‖ reconstruction) per token, in nats")
    base_kl_divergence: float | None = Field(
        None, description="mean KL(fine-tune ‖ base) per token, in nats: what the delta makes up for"
    )
    perplexities: dict[Literal["finetuned", "reconstruction", "base"], float] = Field(
        {}, description="of the next token, on the same data"
    )
    scores: dict[str, float] = Field({}, description="of tasks, by task:metric, as `deltazip eval --record` found them")


class Manifest(_Part):
    """Everything about a version but its name."""

    format_version: Literal[1] = FORMAT_VERSION
    layout_version: int = Field(ge=1, description="version of the packed layout inside the blobs")
    base: BaseRef
    added_tokens: int = Field(0, ge=0, lt=1 << 31, description="rows beyond the base's vocabulary")
    bytes_finetuned: Size = Field(description="size of the whole fine-tuned checkpoint's weights")
    blobs: tuple[BlobEntry, ...]
    files: dict[FileName, FileEntry] = {}
    quality: Quality | None = None

    @model_validator(mode="after")
    def _blocks_are_distinct(self) -> Self:
        blocks = [blob.block for blob in self.blobs]
        if len(set(blocks)) != len(blocks):
            raise ValueError("a block is named twice")
        return self

    @property
    def bytes_artifact(self) -> int:
        """Bytes of all blobs in memory: what a slot holds."""
        return sum(blob.size for blob in self.blobs)

    @property
    def stored(self) -> tuple[BlobEntry | FileEntry, ...]:
        """Every blob and file of the version."""
        return (*self.blobs, *self.files.values())

    @property
    def bytes_stored(self) -> int:
        """Bytes of all blobs and files in a store, compressed where that pays: the most that publishing writes."""
        return sum(entry.object_size for entry in self.stored)

    def canonical(self) -> bytes:
        """The bytes whose sha256 names the version.

        Fields at their defaults are left out, so that adding a field later does not rename older versions.
        """
        data: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        data["format_version"] = self.format_version
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def version(self) -> str:
        """The version's name: sha256 of :meth:`canonical`, in hex."""
        return hashlib.sha256(self.canonical()).hexdigest()


def blob_key(digest: str) -> str:
    """Key of a blob or file below the root of an artifact or of a base; raises InvalidName."""
    return f"blobs/sha256/{check_digest(digest)}"


def parse_manifest(raw: bytes, version: str | None = None) -> Manifest:
    """Parse and check a manifest's bytes; with ``version``, also that they have that digest.

    Raises ManifestInvalid.
    """
    if version is not None and hashlib.sha256(raw).hexdigest() != version:
        raise ManifestInvalid(f"the manifest of version {version[:12]} is damaged: publish the version again")
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise ManifestInvalid(f"not a manifest of format {FORMAT_VERSION}: {first_problem(error)}") from error
