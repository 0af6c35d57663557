"""What of a checkpoint's ``config.json`` decides the computation, in one spelling."""

from typing import Any

from deltazip_ray.errors import CheckpointInvalid

_KEYS = (
    "architectures",
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
)


def architecture_of(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of ``config`` that change what the model computes.

    Releases of transformers write one model's configuration in different spellings: rotary settings as
    ``rope_theta`` and ``rope_scaling`` or as ``rope_parameters``, defaults spelled out or left away. They must
    name the same base, so unset and false are dropped, and so is what follows from other keys.
    """
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise CheckpointInvalid("config.json lacks num_attention_heads or hidden_size: no decoder's configuration")
    found = {key: config.get(key) for key in _KEYS}
    if found["head_dim"] == hidden // heads:
        del found["head_dim"]
    if found["num_key_value_heads"] == heads:
        del found["num_key_value_heads"]
    found["rope"] = _rope(config)
    return {key: value for key, value in found.items() if value not in (None, False)}


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise CheckpointInvalid("rope_parameters in config.json is not an object")
    rope = {"rope_theta": config.get("rope_theta") or 10000.0, "rope_type": settings.get("type", "default"), **settings}
    rope.pop("type", None)
    if not isinstance(rope["rope_theta"], int | float):
        raise CheckpointInvalid("rope_theta in config.json is not a number")
    rope["rope_theta"] = float(rope["rope_theta"])
    return rope
