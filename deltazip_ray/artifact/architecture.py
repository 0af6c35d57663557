"""The part of a checkpoint's ``config.json`` that decides what the model computes, in one spelling."""

from collections.abc import Mapping
from typing import Any

from deltazip_ray.errors import CheckpointInvalid

_KEYS = (
    "architectures",
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_bidirectional_attention",
    "use_parallel_residual",
    "vocab_size",
)
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {"attention_bias": True, "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "use_parallel_residual": True},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"max_window_layers": 28, "use_sliding_window": False},
    "qwen3": {"head_dim": 128, "max_window_layers": 28, "use_sliding_window": False},
}
"""By ``model_type``: the values that transformers assumes for keys that are missing, unless they are None or False."""


def architecture_of(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of ``config`` that change what the model computes. Raises CheckpointInvalid.

    Releases of transformers write the same model's configuration differently: rotary settings as ``rope_theta`` and
    ``rope_scaling`` or as ``rope_parameters``, windows by layer or by rule, defaults spelled out or omitted. All of
    them must give the base the same name, so unset and false values are dropped, and values that follow from others.
    """
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise CheckpointInvalid("config.json has no num_attention_heads or hidden_size: it does not describe a decoder")
    settings = {**_DEFAULTS.get(str(config.get("model_type")), {}), **config}
    found = {key: settings.get(key) for key in _KEYS}
    if found["head_dim"] == hidden // heads:
        del found["head_dim"]
    if found["num_key_value_heads"] == heads:
        del found["num_key_value_heads"]
    found["rope"] = _rope(settings)
    found["windows"] = _windows(settings)
    return {key: value for key, value in found.items() if value not in (None, False)}


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointInvalid("rope_parameters in config.json is not an object")
    theta = settings.get("rope_theta") or settings.get("rotary_emb_base") or 10000.0
    rope = {"rope_theta": theta, "rope_type": given.get("type", "default"), **given}
    rope.pop("type", None)
    if not isinstance(rope["rope_theta"], int | float):
        raise CheckpointInvalid("rope_theta in config.json is not a number")
    rope["rope_theta"] = float(rope["rope_theta"])
    if "rotary_pct" in settings:
        rope.setdefault("partial_rotary_factor", settings["rotary_pct"])
    return rope


def _windows(settings: Mapping[str, Any]) -> list[int] | None:
    """Each layer's attention window in tokens, 0 where it has none; None when no layer has one."""
    window, layers = settings.get("sliding_window"), settings.get("num_hidden_layers")
    if not window or settings.get("use_sliding_window") is False:
        return None
    if not isinstance(window, int) or not isinstance(layers, int):
        raise CheckpointInvalid("sliding_window or num_hidden_layers in config.json is not a whole number")
    kinds = settings.get("layer_types")
    if isinstance(kinds, list):
        return [window if kind == "sliding_attention" else 0 for kind in kinds]
    if settings.get("model_type") == "gemma2":
        return [0 if index % 2 else window for index in range(layers)]
    full = settings.get("max_window_layers", 0)
    return [window if index >= full else 0 for index in range(layers)]
