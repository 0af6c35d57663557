"""The paged KV cache of all layers, in the model's type or in fp8.

A block has the keys and values of all layers in one piece, so that it is memory that something else may have.
"""

import math
from dataclasses import dataclass

import torch

ALIGNMENT = 256
"""Alignment of blocks, in bytes."""
FP8 = torch.float8_e4m3fn
_FP8_TOP = 448.0
"""The largest number of e4m3."""


@dataclass(frozen=True)
class CacheShape:
    """The shape of a block, and the parameters of attention."""

    layers: int
    block_size: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float | None = None
    """Factor on the scores; None: the square root of ``1 / head_dim``."""
    softcap: float | None = None
    """Scores ``s`` become ``cap * tanh(s / cap)``."""
    windows: tuple[int | None, ...] = ()
    """For each layer, the number of tokens that a query attends to, including its own; None, or empty: no limit."""

    def window(self, layer: int) -> int | None:
        """The window of ``layer``."""
        return self.windows[layer] if self.windows else None

    @property
    def factor(self) -> float:
        """The factor on the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class KVLayer:
    """One layer's part of the cache; token ``t`` of block ``b`` is at position ``b * block_size + t``.

    Blocks lie apart, each is contiguous.
    """

    keys: torch.Tensor
    """``[blocks, block_size, kv_heads, head_dim]``."""
    values: torch.Tensor
    """Same shape as the keys."""
    scales: torch.Tensor | None
    """``[blocks, 2, kv_heads, block_size]`` float32: scales of fp8 keys and values, one per token and head."""

    def write(self, where: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write ``k`` and ``v`` ``[tokens, kv_heads, head_dim]`` to positions ``where`` ``[tokens]`` int64."""
        block, token = self._locate(where)
        for i, (cache, x) in enumerate(((self.keys, k), (self.values, v))):
            if self.scales is None:
                cache[block, token] = x
                continue
            scale = x.float().abs().amax(-1) / _FP8_TOP
            rounded = (x.float() / scale.clamp(min=1e-30)[..., None]).to(FP8)
            cache.view(torch.uint8)[block, token] = rounded.view(torch.uint8)
            self.scales[block, i, :, token] = scale

    def read(self, where: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[..., kv_heads, head_dim]`` at positions ``where`` ``[...]``."""
        block, token = self._locate(where)
        if self.scales is None:
            return self.keys[block, token], self.values[block, token]
        found = []
        for i, cache in enumerate((self.keys, self.values)):
            scale = self.scales[block, i, :, token]
            stored = cache.view(torch.uint8)[block, token].view(FP8)
            found.append((stored.float() * scale[..., None]).to(dtype))
        return found[0], found[1]

    def _locate(self, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.keys.shape[1]
        return where // size, where % size


def make_layers(shape: CacheShape, dtype: torch.dtype, memory: torch.Tensor) -> list[KVLayer]:
    """Views of ``memory`` ``[blocks, block_bytes]`` uint8. ``dtype`` may be float8_e4m3fn."""
    each = (shape.layers, 2, shape.block_size, shape.kv_heads, shape.head_dim)
    size = math.prod(each) * dtype.itemsize
    numbers = memory[:, :size].view(dtype).unflatten(1, each)
    if dtype != FP8:
        return [KVLayer(numbers[:, i, 0], numbers[:, i, 1], None) for i in range(shape.layers)]
    scales = memory[:, size : size + _scale_bytes(shape)].view(torch.float32)
    scales = scales.unflatten(1, (shape.layers, 2, shape.kv_heads, shape.block_size))
    return [KVLayer(numbers[:, i, 0], numbers[:, i, 1], scales[:, i]) for i in range(shape.layers)]


def block_bytes(shape: CacheShape, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers, a multiple of ALIGNMENT."""
    heads = 2 * shape.layers * shape.block_size * shape.kv_heads
    size = heads * shape.head_dim * dtype.itemsize + (_scale_bytes(shape) if dtype == FP8 else 0)
    return -(-size // ALIGNMENT) * ALIGNMENT


def _scale_bytes(shape: CacheShape) -> int:
    """Bytes of the scales of one block."""
    return 2 * shape.layers * shape.block_size * shape.kv_heads * torch.float32.itemsize
