"""Tiny random checkpoints of every model family."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.support.tiny import make_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": len(make_tokenizer()),
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    "architectures": None,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "LlamaForCausalLM": LlamaConfig(**GROUPED),
    "MistralForCausalLM": MistralConfig(**GROUPED, sliding_window=24, head_dim=48),
    "Qwen2ForCausalLM": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "Qwen3ForCausalLM": Qwen3Config(**GROUPED, head_dim=48),
    # Caps small enough to bend random scores and logits.
    "Gemma2ForCausalLM": Gemma2Config(
        **GROUPED,
        head_dim=48,
        sliding_window=24,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "GPTNeoXForCausalLM": GPTNeoXConfig(**SIZES),
}
"""By architecture, with what sets it apart."""


def save_model(
    path: Path,
    config: PreTrainedConfig,
    moved: float = 0.0,
    *,
    added: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: str = "1GB",
) -> Path:
    """A random model of one seed, all its weights ``moved`` by noise; biases and norms are no longer trivial.

    With ``added`` tokens, in ``shards`` of at most that size.
    """
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    # Resizing changes the config.
    model = auto.from_config(copy.deepcopy(config), dtype=torch.float32)
    if added:
        model.resize_token_embeddings(config.vocab_size + added, mean_resizing=False)
    noise = torch.Generator().manual_seed(1)
    tuning = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
            parameter += moved * torch.randn(parameter.shape, generator=tuning)
    model.to(dtype).save_pretrained(path, max_shard_size=shards)
    make_tokenizer().save_pretrained(path)
    return path
