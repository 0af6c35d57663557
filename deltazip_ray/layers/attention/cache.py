"""The paged KV cache of all layers, in the model's type or in fp8."""

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
_FP8_TOP = 448.0
"""The largest number of e4m3."""


@dataclass(frozen=True)
class CacheShape:
    """What a block holds, and how it is attended to."""

    layers: int
    block_size: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float | None = None
    """Factor on the scores; None: the root of ``1 / head_dim``."""
    softcap: float | None = None
    """Scores ``s`` become ``cap * tanh(s / cap)``."""
    windows: tuple[int | None, ...] = ()
    """By layer, the tokens that a query sees, its own included; None: all before it. Empty: None for every layer."""

    def window(self, layer: int) -> int | None:
        """That of ``layer``."""
        return self.windows[layer] if self.windows else None

    @property
    def factor(self) -> float:
        """On the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class KVLayer:
    """One layer's part of the cache; token ``t`` of block ``b`` is at position ``b * block_size + t``."""

    keys: torch.Tensor
    """``[positions, kv_heads, head_dim]``."""
    values: torch.Tensor
    """Likewise."""
    scales: torch.Tensor | None
    """``[blocks, 2, kv_heads, block_size]`` float32, of keys and values in fp8: one a token and head."""

    def write(self, where: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store ``k`` and ``v`` ``[tokens, kv_heads, head_dim]`` at positions ``where`` ``[tokens]`` int64."""
        for i, (cache, x) in enumerate(((self.keys, k), (self.values, v))):
            if self.scales is None:
                cache[where] = x
                continue
            scale = x.float().abs().amax(-1) / _FP8_TOP
            rounded = (x.float() / scale.clamp(min=1e-30)[..., None]).to(FP8)
            cache.view(torch.uint8)[where] = rounded.view(torch.uint8)
            size = self.scales.shape[-1]
            self.scales[where // size, i, :, where % size] = scale

    def read(self, where: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[..., kv_heads, head_dim]`` at positions ``where`` ``[...]``."""
        if self.scales is None:
            return self.keys[where], self.values[where]
        found = []
        for i, cache in enumerate((self.keys, self.values)):
            size = self.scales.shape[-1]
            scale = self.scales[where // size, i, :, where % size]
            stored = cache.view(torch.uint8)[where].view(FP8)
            found.append((stored.float() * scale[..., None]).to(dtype))
        return found[0], found[1]


def make_layers(shape: CacheShape, dtype: torch.dtype, blocks: int, device: torch.device) -> list[KVLayer]:
    """``blocks`` blocks of zeros. ``dtype`` may be float8_e4m3fn."""
    size = (shape.layers, 2, blocks * shape.block_size, shape.kv_heads, shape.head_dim)
    numbers = torch.zeros(size, dtype=dtype, device=device)
    if dtype != FP8:
        return [KVLayer(keys, values, None) for keys, values in numbers]
    scales = torch.zeros((shape.layers, blocks, 2, shape.kv_heads, shape.block_size), device=device)
    return [KVLayer(keys, values, own) for (keys, values), own in zip(numbers, scales, strict=True)]


def block_bytes(shape: CacheShape, dtype: torch.dtype) -> int:
    """Memory of one block in all layers."""
    head = shape.head_dim * dtype.itemsize + (torch.float32.itemsize if dtype == FP8 else 0)
    return 2 * shape.layers * shape.block_size * shape.kv_heads * head
