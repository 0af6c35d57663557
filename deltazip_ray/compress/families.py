"""The model families that can be compressed, one entry each, keyed by ``architectures`` of a checkpoint's config."""

from collections.abc import Mapping
from dataclasses import dataclass

LLAMA_STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Family:
    """Where the parts of a decoder are in the transformers module of its architecture."""

    architecture: str
    stages: tuple[tuple[str, ...], ...]
    """Linears of a block in order of dependence; those of one stage share their input."""
    config_keys: tuple[str, ...]
    """Attributes of the transformers config that change the function and must agree with the base's."""
    ignored: tuple[str, ...] = ()
    """Endings of tensor names that old releases saved though they follow from the config."""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"


_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)

FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            architecture="LlamaForCausalLM",
            stages=LLAMA_STAGES,
            config_keys=(*_SHAPE, "attention_bias", "mlp_bias"),
            ignored=("rotary_emb.inv_freq",),
        ),
        Family(architecture="MistralForCausalLM", stages=LLAMA_STAGES, config_keys=(*_SHAPE, "sliding_window")),
        # Biases of q, k and v.
        Family(
            architecture="Qwen2ForCausalLM", stages=LLAMA_STAGES, config_keys=(*_SHAPE, "sliding_window", "layer_types")
        ),
        # Norms over the heads of q and k.
        Family(
            architecture="Qwen3ForCausalLM",
            stages=LLAMA_STAGES,
            config_keys=(*_SHAPE, "attention_bias", "sliding_window", "layer_types"),
        ),
    )
}
