"""The ``adapter_config.json`` of a LoRA adapter in PEFT's format. Settings that change the product are refused."""

import json
import math
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltazip_ray.config import first_problem
from deltazip_ray.errors import CheckpointInvalid

CONFIG = "adapter_config.json"
MERGE = "merge it into its base with PEFT's merge_and_unload() and compress the checkpoint"
UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
)
"""With any of these settings a weight is not just base + scale · B · A."""
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


class AdapterConfig(BaseModel):
    """The settings that define the product; all others are about training."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    def scale(self, module: str, rank: int) -> float:
        """The factor on B · A of ``module``, whose matrices have ``rank``."""
        alpha = self.alpha_pattern.get(_key(self.alpha_pattern, module), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank(self, module: str) -> int:
        """The rank that the matrices of ``module`` must have."""
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.r)


def read_adapter_config(path: Path) -> AdapterConfig:
    """The settings of the adapter in folder ``path``. Raises CheckpointInvalid, naming what is not supported."""
    file = path / CONFIG
    try:
        raw: dict[str, Any] = json.loads(file.read_bytes())
        config = AdapterConfig.model_validate(raw)
    except ValidationError as error:
        raise CheckpointInvalid(f"{file}: {first_problem(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"cannot read {file}: {error}") from error
    if config.peft_type != "LORA":
        raise CheckpointInvalid(f"{file} describes a {config.peft_type} adapter, and only LORA is supported: {MERGE}")
    used = [name for name in UNSUPPORTED if raw.get(name)] + ["bias"] * (raw.get("bias", "none") != "none")
    patterns = [key for key in (*config.rank_pattern, *config.alpha_pattern) if not _PLAIN.fullmatch(key)]
    if used:
        raise CheckpointInvalid(f"{file} sets {', '.join(used)}, which is not supported: {MERGE}")
    if patterns:
        raise CheckpointInvalid(f"{file} selects modules by the regular expression {patterns[0]!r}: {MERGE}")
    return config


def _key(patterns: dict[str, Any], module: str) -> str:
    """The first key that is the module's name or a suffix of it, as in PEFT."""
    return next((key for key in patterns if f".{module}".endswith(f".{key}")), module)
