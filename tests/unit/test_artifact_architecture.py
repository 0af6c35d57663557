"""One architecture has one spelling, whatever release of transformers wrote it; two have two."""

from typing import Any

import pytest
from transformers import Gemma2Config, GPTNeoXConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from deltazip_ray.artifact.architecture import architecture_of
from deltazip_ray.errors import CheckpointInvalid

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
VOCABULARY = {"max_position_embeddings": 512, "vocab_size": 90}
NEOX = GPTNeoXConfig(**SIZES, **VOCABULARY)
GEMMA = Gemma2Config(**SIZES, **VOCABULARY, num_key_value_heads=2)
MISTRAL = MistralConfig(**SIZES, **VOCABULARY, num_key_value_heads=2, sliding_window=16)
QWEN = Qwen2Config(
    **SIZES, **VOCABULARY, num_key_value_heads=2, use_sliding_window=True, sliding_window=16, max_window_layers=3
)


def old(model_type: str, **settings: Any) -> dict[str, Any]:
    """A config as releases wrote it that left defaults away."""
    return {"model_type": model_type, **SIZES, **VOCABULARY, **settings}


@pytest.mark.parametrize(
    ("new", "older"),
    [
        (NEOX, old("gpt_neox", hidden_act="gelu", rotary_pct=0.25, rotary_emb_base=10000, layer_norm_eps=1e-5)),
        (NEOX, old("gpt_neox", hidden_act="gelu")),
        (GEMMA, old("gemma2", num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=10000.0)),
        (
            QWEN,
            old(
                "qwen2",
                num_key_value_heads=2,
                hidden_act="silu",
                rms_norm_eps=1e-6,
                use_sliding_window=True,
                sliding_window=16,
                max_window_layers=3,
            ),
        ),
        (
            Qwen2Config(**SIZES, **VOCABULARY, num_key_value_heads=2),
            old("qwen2", num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-6, sliding_window=131072),
        ),
    ],
)
def test_old_and_new_spellings_are_one(new: PreTrainedConfig, older: dict[str, Any]) -> None:
    assert architecture_of(new.to_dict()) == architecture_of(older)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (NEOX, {"use_parallel_residual": False}),
        (NEOX, {"layer_norm_eps": 1e-6}),
        (NEOX, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        (GEMMA, {"attn_logit_softcapping": None}),
        (GEMMA, {"final_logit_softcapping": 20.0}),
        (GEMMA, {"query_pre_attn_scalar": 128}),
        (GEMMA, {"hidden_activation": "gelu"}),
        (GEMMA, {"layer_types": ["full_attention"] * 4}),
        (GEMMA, {"tie_word_embeddings": False}),
        (GEMMA, {"use_bidirectional_attention": True}),
        (MISTRAL, {"sliding_window": None}),
        (MISTRAL, {"sliding_window": 32}),
        (QWEN, {"use_sliding_window": False}),
        (QWEN, {"layer_types": None, "max_window_layers": 2}),
    ],
)
def test_what_changes_the_function_changes_the_architecture(config: PreTrainedConfig, change: dict[str, Any]) -> None:
    assert architecture_of(config.to_dict()) != architecture_of(config.to_dict() | change)


def test_a_window_that_is_no_number_is_refused() -> None:
    with pytest.raises(CheckpointInvalid, match="sliding_window"):
        architecture_of(MISTRAL.to_dict() | {"sliding_window": "wide"})
