"""The shape of a decoder, read from a checkpoint's ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deltazip_ray.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh"]
NormKind = Literal["rms", "rms_plus_one", "layer"]

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "GPTNeoXForCausalLM": "gpt_neox",
}
# Rope types whose frequencies do not change as a sequence grows, since rotated keys are cached. Those of "dynamic"
# change beyond max_position_embeddings, those of "longrope" beyond the original length: sequences are limited to that.
_STATIC_ROPE = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Names:
    """The names of the parts around the blocks in checkpoints."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"


_NEOX_NAMES = Names("gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder with grouped-query attention and rotary positions."""

    architecture: str
    block: Literal["llama", "gpt_neox"]
    """llama: separate q, k and v, and a gated MLP. gpt_neox: one matrix for q, k and v, a plain MLP, and biases."""
    names: Names
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    """Whether the head is the embedding."""
    embedding_scale: float
    """Factor on the embeddings."""
    logits_softcap: float | None
    """Logits ``x`` become ``cap * tanh(x / cap)``."""
    norm: NormKind
    """``rms_plus_one`` scales by 1 + weight."""
    norm_eps: float
    post_norms: bool
    """Whether the outputs of attention and MLP are normed too."""
    parallel_residual: bool
    """Whether attention and MLP have the same input."""
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Whether each head of q and k has an RMS norm."""
    attention_scale: float
    attention_softcap: float | None
    """Like ``logits_softcap``, for attention scores."""
    windows: tuple[int | None, ...]
    """For each layer, the number of positions that a query attends to, including its own; None: no limit."""
    activation: Activation
    max_positions: int
    inv_freq: torch.Tensor
    """Rotary frequencies, ``[rotated columns of a head / 2]`` in radians per position, float32."""
    rope_scale: float
    """Factor on cosine and sine (yarn)."""


def read_decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read a Hugging Face ``config.json``. Raises ConfigError for models that the decoder does not support."""
    architectures = raw.get("architectures") or ["none"]
    family = _FAMILIES.get(architectures[0])
    if family is None:
        raise ConfigError(
            f"architecture {architectures[0]} is not supported: use a checkpoint of {', '.join(_FAMILIES)}"
        )
    try:
        config = AutoConfig.for_model(family, **{key: value for key, value in raw.items() if key != "model_type"})
    except (StrictDataclassError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"config.json does not describe a {architectures[0]}: {error}") from error
    if getattr(config, "use_bidirectional_attention", False):
        raise ConfigError("use_bidirectional_attention is not supported: text is generated from left to right only")
    neox, gemma = family == "gpt_neox", family == "gemma2"
    bias = family != "mistral" and bool(getattr(config, "attention_bias", False))
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    inv_freq, rope_scale = _rope(config, head_dim, partial=neox)
    return DecoderConfig(
        architecture=architectures[0],
        block="gpt_neox" if neox else "llama",
        names=_NEOX_NAMES if neox else Names(),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads if neox else config.num_key_value_heads,
        head_dim=head_dim,
        tied=bool(config.tie_word_embeddings),
        embedding_scale=config.hidden_size**0.5 if gemma else 1.0,
        logits_softcap=config.final_logit_softcapping if gemma else None,
        norm="layer" if neox else "rms_plus_one" if gemma else "rms",
        norm_eps=config.layer_norm_eps if neox else config.rms_norm_eps,
        post_norms=gemma,
        parallel_residual=neox and config.use_parallel_residual,
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family != "qwen2",
        mlp_bias=neox or bool(getattr(config, "mlp_bias", False)),
        qk_norm=family == "qwen3",
        attention_scale=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
        attention_softcap=config.attn_logit_softcapping if gemma else None,
        windows=_windows(config, family),
        activation=_activation(config.hidden_activation if gemma else config.hidden_act, gated=not neox),
        max_positions=_max_positions(config),
        inv_freq=inv_freq,
        rope_scale=rope_scale,
    )


def _activation(name: str, *, gated: bool) -> Activation:
    served = [known for known, kind in _ACTIVATIONS.items() if not (gated and kind == "gelu")]
    if name not in served:
        raise ConfigError(f"hidden_act {name!r} is not supported in this architecture: only {', '.join(served)}")
    return _ACTIVATIONS[name]


def _windows(config: PreTrainedConfig, family: str) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if family == "mistral" or kinds is None:
        kinds = ["sliding_attention" if family == "mistral" else "full_attention"] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != config.num_hidden_layers:
        raise ConfigError(f"layer_types must name sliding_attention or full_attention for each layer, not {kinds}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _max_positions(config: PreTrainedConfig) -> int:
    """Maximum tokens of a sequence; configs that extend it by yarn may give the length before the extension."""
    rope, most = config.rope_parameters, int(config.max_position_embeddings)
    if rope["rope_type"] == "yarn" and rope.get("factor") and rope.get("original_max_position_embeddings"):
        return max(most, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return min(most, rope["original_max_position_embeddings"]) if rope["rope_type"] == "longrope" else most


def _rope(config: PreTrainedConfig, head_dim: int, *, partial: bool) -> tuple[torch.Tensor, float]:
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind not in _STATIC_ROPE:
        raise ConfigError(
            f"rope type {kind!r} is not supported, as its frequencies change while a sequence grows, and cached keys "
            f"do not: use one of {', '.join(_STATIC_ROPE)}"
        )
    if kind != "default":
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return inv_freq, float(scale)
    rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0)) if partial else head_dim
    columns = torch.arange(0, rotated, 2, dtype=torch.float32)
    return 1.0 / parameters["rope_theta"] ** (columns / rotated), 1.0
