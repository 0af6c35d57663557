"""The decoder: one forward pass over a flat batch whose rows belong to any mixture of versions."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from deltazip_ray.layers.attention.backend import AttentionBackend
from deltazip_ray.layers.embedding import DeltaEmbedding, DeltaHead
from deltazip_ray.layers.rope import Rotary
from deltazip_ray.layers.rows import Rows
from deltazip_ray.models.decoder_config import DecoderConfig
from deltazip_ray.models.weights import WeightReader


@dataclass(frozen=True)
class StepInputs:
    """One step, on the device."""

    tokens: torch.Tensor
    """``[rows]`` int64."""
    positions: torch.Tensor
    """``[rows]`` int64, of each token in its sequence."""
    rows: Rows
    plan: Any
    """What the attention backend planned for these rows."""
    last: torch.Tensor
    """``[sampled]`` int64: rows whose logits are wanted, in order."""
    last_rows: Rows
    """The versions of those."""


@dataclass(frozen=True)
class StepContext:
    """What every layer needs in a step."""

    rows: Rows
    rotation: tuple[torch.Tensor, torch.Tensor]
    plan: Any


class Attention:
    """Grouped-query self-attention."""

    def __init__(
        self, index: int, config: DecoderConfig, weights: WeightReader, rotary: Rotary, backend: AttentionBackend[Any]
    ) -> None:
        prefix = f"model.layers.{index}.self_attn"
        self.index = index
        self.head_dim = config.head_dim
        kv_size = config.kv_heads * config.head_dim
        self.sizes = [config.heads * config.head_dim, kv_size, kv_size]
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        self.qkv = weights.linear(names, self.sizes, config.hidden_size, bias=config.qkv_bias)
        self.out = weights.linear([f"{prefix}.o_proj"], [config.hidden_size], self.sizes[0], bias=config.out_bias)
        self.rotary = rotary
        self.backend = backend

    def __call__(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """``[rows, hidden]`` to ``[rows, hidden]``; writes this layer's keys and values."""
        parts = torch.split(self.qkv(x, step.rows), self.sizes, dim=-1)
        q, k, v = (part.view(len(x), -1, self.head_dim) for part in parts)
        q, k = self.rotary(q, step.rotation), self.rotary(k, step.rotation)
        return self.out(self.backend.attend(self.index, q, k, v, step.plan), step.rows)


class GatedMLP:
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, index: int, config: DecoderConfig, weights: WeightReader) -> None:
        prefix = f"model.layers.{index}.mlp"
        hidden, inner = config.hidden_size, config.intermediate_size
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        self.gate_up = weights.linear(names, [inner, inner], hidden, bias=config.mlp_bias)
        self.down = weights.linear([f"{prefix}.down_proj"], [hidden], inner, bias=config.mlp_bias)

    def __call__(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """``[rows, hidden]`` to ``[rows, hidden]``."""
        gate, up = self.gate_up(x, step.rows).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, step.rows)


class DecoderLayer:
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(
        self, index: int, config: DecoderConfig, weights: WeightReader, rotary: Rotary, backend: AttentionBackend[Any]
    ) -> None:
        prefix = f"model.layers.{index}"
        self.attention = Attention(index, config, weights, rotary, backend)
        self.mlp = GatedMLP(index, config, weights)
        self.input_norm = weights.norm(f"{prefix}.input_layernorm", config.hidden_size, config.norm_eps)
        self.mlp_norm = weights.norm(f"{prefix}.post_attention_layernorm", config.hidden_size, config.norm_eps)

    def __call__(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The residual stream ``[rows, hidden]`` after this layer."""
        hidden = hidden + self.attention(self.input_norm(hidden, step.rows), step)
        return hidden + self.mlp(self.mlp_norm(hidden, step.rows), step)


class Decoder:
    """A whole model. ``weights.targets`` then has a target for every weight that a version may change."""

    def __init__(
        self, config: DecoderConfig, weights: WeightReader, backend: AttentionBackend[Any], max_positions: int
    ) -> None:
        place = weights.placement
        rotary = Rotary(config.inv_freq, config.rope_scale, max_positions, dtype=place.dtype, device=place.device)
        shape = (config.vocab_size, config.hidden_size)
        tokens = weights.matrix("model.embed_tokens.weight", shape)
        added = weights.added(tokens.name, config.hidden_size)
        self.embedding = DeltaEmbedding(tokens.base, tokens, added)
        self.layers = [DecoderLayer(i, config, weights, rotary, backend) for i in range(config.layers)]
        self.norm = weights.norm("model.norm", config.hidden_size, config.norm_eps)
        if not config.tied:
            tokens = weights.matrix("lm_head.weight", shape)
            added = weights.added(tokens.name, config.hidden_size)
        self.head = DeltaHead(tokens.base, tokens, added, backend=place.backend)
        self.rotary = rotary
        self.added = self.embedding.added

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Float32 logits ``[sampled, vocab + added]`` of ``inputs.last``; writes the KV cache."""
        step = StepContext(inputs.rows, self.rotary.select(inputs.positions), inputs.plan)
        hidden = self.embedding(inputs.tokens, inputs.rows)
        for layer in self.layers:
            hidden = layer(hidden, step)
        last = hidden[inputs.last]
        return self.head(self.norm(last, inputs.last_rows), inputs.last_rows)
