"""Settings of one compression."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from deltazip_ray.config import Settings

MatrixCodec = Literal["int4", "int3", "int2", "int1", "sparse24_int4", "sparse24_int2"]
Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction (0 to 1) of the whole that is done."""


class CompressOptions(Settings):
    """How to compress. Equal options on equal checkpoints give equal versions (same machine, same thread count)."""

    codec: MatrixCodec = Field("int4", description="codec of the matrices inside the decoder blocks")
    outer_codec: MatrixCodec = Field(
        "int4", description="codec of embedding and head; few bits cost most there, and a lookup cannot compensate"
    )
    calibration: Path | None = Field(
        None, description="a text file, or chats as .jsonl; without, sequences are sampled from the fine-tune"
    )
    samples: int = Field(128, ge=2, description="calibration sequences, the held-out ones included")
    sequence_length: int = Field(256, ge=8, description="tokens of a calibration sequence at most")
    held_out: float = Field(0.125, gt=0, lt=1, description="share of the sequences that only measure quality")
    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, in units of its mean")
    seed: int = Field(0, ge=0, description="of the sampled calibration sequences")
    batch_sequences: int = Field(16, ge=1, description="sequences in one forward pass")
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the calibration forward passes")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]


def silent(what: str, fraction: float) -> None:
    """A :data:`Progress` that shows nothing."""
