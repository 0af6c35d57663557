"""What the decoder needs from an attention implementation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

PlanT = TypeVar("PlanT")


@dataclass(frozen=True)
class CacheShape:
    """The paged KV cache of all layers."""

    layers: int
    blocks: int
    block_size: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class SequenceRows:
    """One sequence of a step: its rows are the last ``queries`` of its ``context`` tokens."""

    queries: int
    context: int
    """Tokens in the cache once this step has written its own."""
    blocks: Sequence[int]
    """Block table: token ``t`` lies in block ``blocks[t // block_size]``."""


class AttentionBackend(ABC, Generic[PlanT]):
    """Owns the KV cache. A step makes one plan on the host and uses it in every layer."""

    @abstractmethod
    def plan(self, sequences: Sequence[SequenceRows]) -> PlanT:
        """Prepare a step whose rows are those of ``sequences``, one after the other."""

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PlanT) -> torch.Tensor:
        """Write ``k`` and ``v`` to the cache, then attend causally within each sequence.

        ``q`` ``[rows, heads, head_dim]``, ``k`` and ``v`` ``[rows, kv_heads, head_dim]``, both rotated already;
        returns ``[rows, heads * head_dim]``.
        """
