"""The decoder's interface to attention implementations."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from deltazip_ray.kvcache.block_manager import BlockTable
from deltazip_ray.layers.attention.cache import CacheShape, KVLayer, block_bytes, make_layers


class SequenceRows(NamedTuple):
    """One sequence of a step: its rows are the last ``queries`` of its ``context`` tokens."""

    queries: int
    context: int
    """Tokens in the cache once this step has written its own."""
    blocks: BlockTable
    """Block table: token ``t`` lies in block ``blocks[t // block_size]``."""


class AttentionPlan(Protocol):
    """A backend's preparations for a step."""

    @property
    def where(self) -> torch.Tensor:
        """``[rows]`` int64: the cache positions for each row's key and value."""


PlanT = TypeVar("PlanT", bound=AttentionPlan)


class AttentionBackend(ABC, Generic[PlanT]):
    """Owns the KV cache. A step makes one plan on the host and uses it in every layer."""

    def __init__(
        self, shape: CacheShape, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None = None
    ) -> None:
        """Without a cache, which takes what memory is left once the weights are there.

        ``kv_dtype`` is that of cached numbers: ``dtype`` when absent, or float8_e4m3fn.
        """
        self.shape = shape
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.device = device
        self.blocks = 0
        self.memory = torch.empty((0, self.block_bytes), dtype=torch.uint8, device=device)
        """``[blocks + others + 1, block_bytes]``, see :meth:`allocate`."""
        self.layers: list[KVLayer] = []

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return block_bytes(self.shape, self.kv_dtype)

    def allocate(self, blocks: int, others: int = 0) -> None:
        """Allocate ``blocks`` blocks of zeros, then ``others`` that may be lent to the cache, and ``padding``."""
        self.blocks = blocks
        self.memory = self.memory.new_zeros((blocks + others + 1, self.block_bytes))
        self.layers = make_layers(self.shape, self.kv_dtype, self.memory)

    @property
    def padding(self) -> int:
        """The block for rows that pad a batch; it belongs to no sequence."""
        return len(self.memory) - 1

    @abstractmethod
    def plan(self, sequences: Sequence[SequenceRows]) -> PlanT:
        """Prepare a step whose rows are those of ``sequences``, in order."""

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor, plan: PlanT) -> torch.Tensor:
        """Attend causally within each sequence, whose new keys and values are in the cache already.

        ``q`` ``[rows, heads, head_dim]``, rotated; returns ``[rows, heads * head_dim]``.
        """
