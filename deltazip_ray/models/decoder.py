"""The decoder: one forward pass over a flat batch whose rows belong to any mixture of versions."""

from dataclasses import dataclass
from typing import Any

import torch

from deltazip_ray.layers.activations import Activations
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
    last: torch.Tensor | None
    """``[sampled]`` int64: rows whose logits are wanted, in order; None: all."""
    last_rows: Rows
    """The versions of those."""


@dataclass(frozen=True)
class StepContext:
    """What every layer needs in a step."""

    rows: Rows
    positions: torch.Tensor
    plan: Any


class Attention:
    """Grouped-query self-attention."""

    def __init__(
        self, index: int, config: DecoderConfig, weights: WeightReader, rotary: Rotary, backend: AttentionBackend[Any]
    ) -> None:
        prefix = f"model.layers.{index}.self_attn"
        self.index = index
        kv_size = config.kv_heads * config.head_dim
        sizes = [config.heads * config.head_dim, kv_size, kv_size]
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        self.qkv = weights.linear(names, sizes, config.hidden_size, bias=config.qkv_bias)
        self.out = weights.linear([f"{prefix}.o_proj"], [config.hidden_size], sizes[0], bias=config.out_bias)
        self.rotary = rotary
        self.backend = backend
        self.ops = weights.placement.ops

    def __call__(self, x: Activations, step: StepContext) -> torch.Tensor:
        """``[rows, hidden]`` to ``[rows, hidden]``; writes this layer's keys and values."""
        qkv = self.qkv(x, step.rows)
        q = self.ops.rotate(qkv, step.positions, self.rotary, self.backend.layers[self.index], step.plan.where)
        return self.out(Activations(self.backend.attend(self.index, q, step.plan)), step.rows)


class GatedMLP:
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, index: int, config: DecoderConfig, weights: WeightReader) -> None:
        prefix = f"model.layers.{index}.mlp"
        hidden, inner = config.hidden_size, config.intermediate_size
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        self.gate_up = weights.linear(names, [inner, inner], hidden, bias=config.mlp_bias)
        self.down = weights.linear([f"{prefix}.down_proj"], [hidden], inner, bias=config.mlp_bias)
        self.ops = weights.placement.ops

    def __call__(self, x: Activations, step: StepContext) -> torch.Tensor:
        """``[rows, hidden]`` to ``[rows, hidden]``."""
        return self.down(self.ops.silu_mul(self.gate_up(x, step.rows)), step.rows)


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

    def __call__(self, stream: torch.Tensor, update: torch.Tensor | None, step: StepContext) -> torch.Tensor:
        """This layer's update of the residual ``stream`` ``[rows, hidden]``, for the next layer to add.

        ``update`` is that of the layer before; it is added to ``stream`` in place, in one pass with the norm.
        """
        update = self.attention(self.input_norm(stream, step.rows, update), step)
        return self.mlp(self.mlp_norm(stream, step.rows, update), step)


class Decoder:
    """A whole model. ``weights.targets`` then has a target for every weight that a version may change."""

    def __init__(
        self, config: DecoderConfig, weights: WeightReader, backend: AttentionBackend[Any], max_positions: int
    ) -> None:
        place = weights.placement
        rotary = Rotary(config.inv_freq, config.rope_scale, max_positions, place.device)
        shape = (config.vocab_size, config.hidden_size)
        tokens = weights.matrix("model.embed_tokens.weight", shape)
        added = weights.added(tokens.name, config.hidden_size)
        self.embedding = DeltaEmbedding(tokens, added)
        self.layers = [DecoderLayer(i, config, weights, rotary, backend) for i in range(config.layers)]
        self.norm = weights.norm("model.norm", config.hidden_size, config.norm_eps)
        if not config.tied:
            tokens = weights.matrix("lm_head.weight", shape)
            added = weights.added(tokens.name, config.hidden_size)
        self.head = DeltaHead(tokens, added, place.ops)

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Float32 logits ``[sampled, vocab + added]`` of ``inputs.last``; writes the KV cache."""
        step = StepContext(inputs.rows, inputs.positions, inputs.plan)
        stream = self.embedding(inputs.tokens, inputs.rows)
        update = self.layers[0](stream, None, step)
        for layer in self.layers[1:]:
            update = layer(stream, update, step)
        if inputs.last is not None:
            stream, update = stream[inputs.last], update[inputs.last]
        return self.head(self.norm(stream, inputs.last_rows, update), inputs.last_rows)
