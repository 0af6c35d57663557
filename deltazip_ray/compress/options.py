"""Settings of one compression."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from deltazip_ray.artifact.requirements import parse_requirements
from deltazip_ray.config import CodecName, Dtype, MatrixCodec, Settings

Coding = Literal["absent", CodecName]
"""How one matrix is kept; ``absent``: not at all, the base's own serves."""
Progress = Callable[[str, float], None]
"""Called with the current activity and the fraction of all work (0 to 1) that is done."""

GOALS = ("target_bits", "target_ratio", "max_error")
"""Settings that choose a codec for each matrix, instead of ``codec`` and ``outer_codec``."""


class CompressOptions(Settings):
    """How to compress. Equal options on equal checkpoints give equal versions (same machine, same thread count)."""

    codec: MatrixCodec = Field("int4", description="codec of the matrices inside the decoder blocks")
    outer_codec: MatrixCodec = Field(
        "int4", description="codec of embedding and head, where few bits cost most: a lookup cannot compensate"
    )
    codecs: dict[str, Coding] = Field({}, description="codecs of single matrices by weight name; override all others")
    target_bits: float | None = Field(
        None, gt=0, description="choose codecs such that changed matrices take this many bits per weight"
    )
    target_ratio: float | None = Field(
        None, gt=0, description="choose codecs such that all blobs are this many times smaller than 16-bit weights"
    )
    max_error: float | None = Field(
        None, gt=0, lt=1, description="choose the smallest codec with at most this relative output error per matrix"
    )
    calibration: Path | None = Field(
        None, description="a text file, or chats as .jsonl; default: sequences sampled from the fine-tune"
    )
    dataset: str | None = Field(
        None, min_length=1, description="a Hugging Face dataset instead of a file: NAME or NAME:CONFIG"
    )
    samples: int = Field(128, ge=2, description="calibration sequences, including the held-out ones")
    sequence_length: int = Field(256, ge=8, description="maximum tokens of a calibration sequence")
    held_out: float = Field(0.125, gt=0, lt=1, description="share of the sequences that only measure quality")
    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, in units of its mean")
    require: str | None = Field(None, description="bounds on the quality, such as kl<0.05,block<2%")
    seed: int = Field(0, ge=0, description="seed of the sampled calibration sequences")
    batch_sequences: int = Field(16, ge=1, description="sequences in one forward pass")
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Dtype = Field("float32", description="dtype of the calibration forward passes")

    @field_validator("require")
    @classmethod
    def _can_be_checked(cls, require: str | None) -> str | None:
        """Fail now, not after an hour of work: ConfigError, or ValueError for bounds that compression cannot check."""
        for bound in parse_requirements(require) if require is not None else ():
            if bound.is_score:
                raise ValueError(
                    f"{bound.measure} cannot be measured before the artifact exists: use `deltazip eval --record`, "
                    "then `deltazip publish --require`"
                )
        return require

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        goals = [goal for goal in GOALS if getattr(self, goal) is not None]
        fixed = [name for name in ("codec", "outer_codec") if name in self.model_fields_set]
        if len(goals) > 1 or (goals and fixed):
            raise ValueError(f"{' and '.join(fixed + goals)} contradict each other: give one of them")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is not None and self.calibration is not None:
            raise ValueError("dataset and calibration contradict each other: give one of them")
        return self

    @property
    def allocated(self) -> bool:
        """Whether codecs are chosen by bit allocation."""
        return self.target_bits is not None or self.target_ratio is not None

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def silent(what: str, fraction: float) -> None:
    """A :data:`Progress` that shows nothing."""
