"""What the decoder needs from an attention implementation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch


@dataclass(frozen=True)
class CacheShape:
    """The paged KV cache of all layers."""

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


class KVLayer(NamedTuple):
    """One layer's part of the cache, each ``[positions, kv_heads, head_dim]``."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class SequenceRows:
    """One sequence of a step: its rows are the last ``queries`` of its ``context`` tokens."""

    queries: int
    context: int
    """Tokens in the cache once this step has written its own."""
    blocks: Sequence[int]
    """Block table: token ``t`` lies in block ``blocks[t // block_size]``."""


class AttentionPlan(Protocol):
    """What a backend has prepared for a step."""

    @property
    def where(self) -> torch.Tensor:
        """``[rows]`` int64: the position of the cache where each row's key and value go."""


PlanT = TypeVar("PlanT", bound=AttentionPlan)


class AttentionBackend(ABC, Generic[PlanT]):
    """Owns the KV cache. A step makes one plan on the host and uses it in every layer."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        """Without a cache, which takes what memory is left once the weights are there."""
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.blocks = 0
        self.layers: list[KVLayer] = []

    @property
    def block_bytes(self) -> int:
        """Memory of one block in all layers."""
        shape = self.shape
        return 2 * shape.layers * shape.block_size * shape.kv_heads * shape.head_dim * self.dtype.itemsize

    def allocate(self, blocks: int) -> None:
        """A cache of ``blocks`` blocks of zeros, and one more, to which the rows that pad a batch write."""
        shape = self.shape
        self.blocks = blocks
        size = (shape.layers, 2, (blocks + 1) * shape.block_size, shape.kv_heads, shape.head_dim)
        self.layers = [KVLayer(*layer) for layer in torch.zeros(size, dtype=self.dtype, device=self.device)]

    @abstractmethod
    def plan(self, sequences: Sequence[SequenceRows]) -> PlanT:
        """Prepare a step whose rows are those of ``sequences``, one after the other."""

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor, plan: PlanT) -> torch.Tensor:
        """Attend causally within each sequence, whose new keys and values are in the cache already.

        ``q`` ``[rows, heads, head_dim]``, rotated; returns ``[rows, heads * head_dim]``.
        """
