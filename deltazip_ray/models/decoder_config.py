"""The shape of a decoder, read from a checkpoint's ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deltazip_ray.errors import ConfigError

# Rope types whose frequencies do not depend on how long a sequence has become.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder with grouped-query attention, rotary positions and a gated SiLU MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    max_positions: int
    inv_freq: torch.Tensor
    """Rotary frequencies, ``[head_dim / 2]`` in radians per position, float32."""
    rope_scale: float
    """Factor on cosine and sine (yarn)."""


def read_decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read a Hugging Face ``config.json``. Raises ConfigError for what the decoder cannot compute."""
    architectures = raw.get("architectures") or ["none"]
    family = _FAMILIES.get(architectures[0])
    if family is None:
        raise ConfigError(f"architecture {architectures[0]} is not served: use a checkpoint of {', '.join(_FAMILIES)}")
    try:
        config = AutoConfig.for_model(family, **{key: value for key, value in raw.items() if key != "model_type"})
    except (StrictDataclassError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"config.json is not that of a {architectures[0]}: {error}") from error
    if config.hidden_act != "silu":
        raise ConfigError(f"hidden_act {config.hidden_act!r} is not served: only silu")
    if getattr(config, "use_sliding_window", False):
        raise ConfigError("sliding-window attention is not served: set use_sliding_window to false")
    inv_freq, rope_scale = _rope(config)
    bias = family == "qwen2"
    return DecoderConfig(
        architecture=architectures[0],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        norm_eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=bias or bool(getattr(config, "attention_bias", False)),
        out_bias=not bias and bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        max_positions=config.max_position_embeddings,
        inv_freq=inv_freq,
        rope_scale=rope_scale,
    )


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: PreTrainedConfig) -> tuple[torch.Tensor, float]:
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind not in _STATIC_ROPE:
        raise ConfigError(f"rope type {kind!r} is not served: use one of {', '.join(_STATIC_ROPE)}")
    if kind != "default":
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return inv_freq, float(scale)
    dims = torch.arange(0, _head_dim(config), 2, dtype=torch.float32)
    return 1.0 / parameters["rope_theta"] ** (dims / _head_dim(config)), 1.0
