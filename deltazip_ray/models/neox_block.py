"""A decoder block of GPT-NeoX and Pythia: layer norms, biases everywhere, attention and MLP in parallel."""

from typing import Any

import torch
import torch.nn.functional as F

from deltazip_ray.layers.activations import Activations
from deltazip_ray.layers.attention.backend import AttentionBackend
from deltazip_ray.layers.rope import Rotary
from deltazip_ray.models.block import StepContext
from deltazip_ray.models.decoder_config import DecoderConfig
from deltazip_ray.models.weights import WeightReader


class NeoXAttention:
    """Self-attention with one matrix, whose outputs are q, k and v of the first head, then of the second, and so on."""

    def __init__(
        self, index: int, config: DecoderConfig, weights: WeightReader, rotary: Rotary, backend: AttentionBackend[Any]
    ) -> None:
        prefix, hidden = f"{config.names.layers}.{index}.attention", config.hidden_size
        self.index = index
        self.heads = config.heads
        self.qkv = weights.linear([f"{prefix}.query_key_value"], [3 * hidden], hidden, bias=config.qkv_bias)
        self.out = weights.linear([f"{prefix}.dense"], [hidden], hidden, bias=config.out_bias)
        self.rotary = rotary
        self.backend = backend
        self.ops = weights.placement.ops

    def __call__(self, x: Activations, step: StepContext) -> torch.Tensor:
        """``[rows, hidden]`` to ``[rows, hidden]``; writes this layer's keys and values."""
        by_head = self.qkv(x, step.rows).unflatten(1, (self.heads, 3, -1))
        qkv = by_head.transpose(1, 2).flatten(1)
        q = self.ops.rotate(qkv, step.positions, self.rotary, self.backend.layers[self.index], step.plan.where)
        return self.out(Activations(self.backend.attend(self.index, q, step.plan)), step.rows)


class NeoXMLP:
    """``down(act(up(x)))``."""

    def __init__(self, index: int, config: DecoderConfig, weights: WeightReader) -> None:
        prefix = f"{config.names.layers}.{index}.mlp"
        hidden, inner = config.hidden_size, config.intermediate_size
        self.up = weights.linear([f"{prefix}.dense_h_to_4h"], [inner], hidden, bias=config.mlp_bias)
        self.down = weights.linear([f"{prefix}.dense_4h_to_h"], [hidden], inner, bias=config.mlp_bias)
        self.activation = config.activation

    def __call__(self, x: Activations, step: StepContext) -> torch.Tensor:
        """``[rows, hidden]`` to ``[rows, hidden]``."""
        return self.down(Activations(self._activate(self.up(x, step.rows))), step.rows)

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation == "silu":
            return F.silu(x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class NeoXBlock:
    """Attention and MLP, each with its own norm, on the same input (``parallel``) or one after the other."""

    def __init__(
        self, index: int, config: DecoderConfig, weights: WeightReader, rotary: Rotary, backend: AttentionBackend[Any]
    ) -> None:
        prefix, size = f"{config.names.layers}.{index}", config.hidden_size
        self.attention = NeoXAttention(index, config, weights, rotary, backend)
        self.mlp = NeoXMLP(index, config, weights)
        self.input_norm = weights.norm(f"{prefix}.input_layernorm", size, config.norm, config.norm_eps)
        self.mlp_norm = weights.norm(f"{prefix}.post_attention_layernorm", size, config.norm, config.norm_eps)
        self.parallel = config.parallel_residual

    def __call__(self, stream: torch.Tensor, update: torch.Tensor | None, step: StepContext) -> torch.Tensor:
        """See :class:`~deltazip_ray.models.block.LlamaBlock`."""
        attended = self.attention(self.input_norm(stream, step.rows, update), step)
        if self.parallel:
            return attended + self.mlp(self.mlp_norm(stream, step.rows), step)
        return self.mlp(self.mlp_norm(stream, step.rows, attended), step)
