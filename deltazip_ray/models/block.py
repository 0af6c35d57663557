"""A decoder block of Llama, with the variations of Mistral, Qwen and Gemma."""

from dataclasses import dataclass
from typing import Any

import torch

from deltazip_ray.layers.activations import Activations
from deltazip_ray.layers.attention.backend import AttentionBackend
from deltazip_ray.layers.norm import Norm
from deltazip_ray.layers.rope import Rotary
from deltazip_ray.layers.rows import Rows
from deltazip_ray.models.decoder_config import DecoderConfig
from deltazip_ray.models.weights import WeightReader


@dataclass(frozen=True)
class StepContext:
    """The inputs of a step that all blocks share."""

    rows: Rows
    positions: torch.Tensor
    plan: Any


class Attention:
    """Grouped-query self-attention."""

    def __init__(
        self, index: int, config: DecoderConfig, weights: WeightReader, rotary: Rotary, backend: AttentionBackend[Any]
    ) -> None:
        prefix = f"{config.names.layers}.{index}.self_attn"
        self.index = index
        kv_size = config.kv_heads * config.head_dim
        sizes = [config.heads * config.head_dim, kv_size, kv_size]
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        self.qkv = weights.linear(names, sizes, config.hidden_size, bias=config.qkv_bias)
        self.out = weights.linear([f"{prefix}.o_proj"], [config.hidden_size], sizes[0], bias=config.out_bias)
        self.norm = None
        if config.qk_norm:
            self.norm = weights.head_norm((f"{prefix}.q_norm", f"{prefix}.k_norm"), config.head_dim, config.norm_eps)
        self.rotary = rotary
        self.backend = backend
        self.ops = weights.placement.ops

    def __call__(self, x: Activations, step: StepContext) -> torch.Tensor:
        """``[rows, hidden]`` to ``[rows, hidden]``; writes this layer's keys and values."""
        qkv = self.qkv(x, step.rows)
        norm = None if self.norm is None else self.norm.of(step.rows)
        cache = self.backend.layers[self.index]
        q = self.ops.rotate(qkv, step.positions, self.rotary, cache, step.plan.where, norm)
        return self.out(Activations(self.backend.attend(self.index, q, step.plan)), step.rows)


class GatedMLP:
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, index: int, config: DecoderConfig, weights: WeightReader) -> None:
        prefix = f"{config.names.layers}.{index}.mlp"
        hidden, inner = config.hidden_size, config.intermediate_size
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        self.gate_up = weights.linear(names, [inner, inner], hidden, bias=config.mlp_bias)
        self.down = weights.linear([f"{prefix}.down_proj"], [hidden], inner, bias=config.mlp_bias)
        ops = weights.placement.ops
        self.activate = ops.silu_mul if config.activation == "silu" else ops.gelu_mul

    def __call__(self, x: Activations, step: StepContext) -> torch.Tensor:
        """``[rows, hidden]`` to ``[rows, hidden]``."""
        return self.down(self.activate(self.gate_up(x, step.rows), step.rows), step.rows)


class LlamaBlock:
    """Attention and MLP with a norm before each, on a residual stream; Gemma also norms their outputs."""

    def __init__(
        self, index: int, config: DecoderConfig, weights: WeightReader, rotary: Rotary, backend: AttentionBackend[Any]
    ) -> None:
        prefix = f"{config.names.layers}.{index}"
        self.attention = Attention(index, config, weights, rotary, backend)
        self.mlp = GatedMLP(index, config, weights)
        self.attention_norm: Norm | None = None
        self.output_norm: Norm | None = None

        def norm(name: str) -> Norm:
            return weights.norm(f"{prefix}.{name}", config.hidden_size, config.norm, config.norm_eps)

        self.input_norm = norm("input_layernorm")
        if config.post_norms:
            self.attention_norm = norm("post_attention_layernorm")
            self.mlp_norm = norm("pre_feedforward_layernorm")
            self.output_norm = norm("post_feedforward_layernorm")
        else:
            self.mlp_norm = norm("post_attention_layernorm")

    def __call__(self, stream: torch.Tensor, update: torch.Tensor | None, step: StepContext) -> torch.Tensor:
        """Return this block's update of the residual ``stream`` ``[rows, hidden]``, which the next block adds.

        ``update``, of the block before, is added to ``stream`` in place, in one pass with the norm.
        """
        update = self.attention(self.input_norm(stream, step.rows, update), step)
        if self.attention_norm is not None:
            update = self.attention_norm(update, step.rows).values
        update = self.mlp(self.mlp_norm(stream, step.rows, update), step)
        if self.output_norm is not None:
            update = self.output_norm(update, step.rows).values
        return update
