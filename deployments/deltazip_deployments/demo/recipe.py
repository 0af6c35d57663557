"""The settings for training the demo's models. Without torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from deltazip_ray.config import Settings


class Phase(Settings):
    """One training run: AdamW with warm-up and linear decay."""

    steps: int = Field(ge=1)
    batch: int = Field(64, ge=1, description="sequences of one step")
    peak_lr: float = Field(gt=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate climbs to its peak")
    decay: float = Field(0.7, gt=0, le=1, description="share of the steps, the last ones, in which it falls to zero")


class Recipe(Settings):
    """The base and its fine-tunes. Hidden and intermediate sizes are multiples of the codecs' group of 128."""

    hidden: int = Field(128, ge=32)
    intermediate: int = Field(384, ge=32)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    rope_theta: float = Field(
        100.0, gt=1, description="small: the strings are short, and neighbours must be told apart"
    )
    pretrain: Phase = Phase(steps=1200, peak_lr=2.5e-3)
    finetune: Phase = Phase(steps=120, peak_lr=7e-4)
    seed: int = Field(0, ge=0)
    threads: int = Field(2, ge=1, description="more do not help models of this size")

    def key(self, sources: Sequence[Path]) -> str:
        """Identifies the result of this recipe and the code in ``sources``: 16 hex digits."""
        digest = hashlib.sha256(self.model_dump_json().encode())
        for path in sources:
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]
