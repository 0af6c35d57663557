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
    """Names of the parts of a decoder in the transformers module of its architecture."""

    architecture: str
    stages: tuple[tuple[str, ...], ...]
    """Linears of a block in the order in which they run; those of one stage share their input."""
    config_keys: tuple[str, ...]
    """Attributes of the transformers config that must equal the base's, as they change the computation."""
    ignored: tuple[str, ...] = ()
    """Suffixes of tensors that old releases saved although they follow from the config."""
    attention: str = "sdpa"
    """The attention implementation of transformers to run its blocks with."""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size."""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    """As checkpoints name it."""


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rope_parameters",
    "tie_word_embeddings",
)
_GROUPED = (*_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps")
_SHAPE = (*_GROUPED, "hidden_act")

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
        Family(
            architecture="Gemma2ForCausalLM",
            stages=LLAMA_STAGES,
            config_keys=(
                *_GROUPED,
                "hidden_activation",
                "attention_bias",
                "query_pre_attn_scalar",
                "attn_logit_softcapping",
                "final_logit_softcapping",
                "sliding_window",
                "layer_types",
                "use_bidirectional_attention",
            ),
            # SDPA has no soft caps.
            attention="eager",
            scaled_embedding=True,
        ),
        # Pythia, GPT-NeoX. Query, key and value are one matrix, interleaved by head.
        Family(
            architecture="GPTNeoXForCausalLM",
            stages=(
                ("attention.query_key_value",),
                ("attention.dense",),
                ("mlp.dense_h_to_4h",),
                ("mlp.dense_4h_to_h",),
            ),
            config_keys=(*_SIZES, "hidden_act", "layer_norm_eps", "attention_bias", "use_parallel_residual"),
            ignored=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
            layers="gpt_neox.layers",
            embedding="gpt_neox.embed_in",
            norm="gpt_neox.final_layer_norm",
            rotary="gpt_neox.rotary_emb",
            head="embed_out",
        ),
    )
}
