"""Paged attention on torch's scaled_dot_product_attention: for the CPU, and a reference for other backends."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deltazip_ray.layers.attention.backend import AttentionBackend, SequenceRows


@dataclass(frozen=True)
class _Group:
    """Sequences with equally many rows, computed as one padded batch."""

    rows: torch.Tensor
    """``[sequences, queries]``, rows of the step."""
    positions: torch.Tensor
    """``[sequences, keys]``, where their tokens lie in the cache."""
    mask: torch.Tensor
    """``[sequences, 1, queries, keys]``, True where a query may look."""


@dataclass(frozen=True)
class SdpaPlan:
    """One step."""

    where: torch.Tensor
    """``[rows]`` int64, where each row's key and value go in the cache."""
    groups: tuple[_Group, ...]


class SdpaBackend(AttentionBackend[SdpaPlan]):
    """Gathers contexts each step."""

    def plan(self, sequences: Sequence[SequenceRows]) -> SdpaPlan:
        """Group sequences by their number of rows: all decodes together, prefill chunks mostly alone."""
        starts = np.cumsum([0, *(sequence.queries for sequence in sequences)])
        members: dict[int, list[int]] = {}
        for i, sequence in enumerate(sequences):
            members.setdefault(sequence.queries, []).append(i)
        write = np.empty(starts[-1], dtype=np.int64)
        groups = []
        for queries, indices in members.items():
            rows = starts[indices][:, None] + np.arange(queries)
            positions, mask, written = self._contexts([sequences[i] for i in indices], queries)
            write[rows] = written
            groups.append(_Group(self._tensor(rows), self._tensor(positions), self._tensor(mask)[:, None]))
        return SdpaPlan(self._tensor(write), tuple(groups))

    def _contexts(self, sequences: list[SequenceRows], queries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cache positions ``[n, keys]``, mask ``[n, queries, keys]``, and the positions ``[n, queries]`` to write."""
        block_size = self.shape.block_size
        contexts = np.array([sequence.context for sequence in sequences])[:, None]
        keys = np.arange(contexts.max())
        tables = np.zeros((len(sequences), -(-len(keys) // block_size)), dtype=np.int64)
        for table, sequence in zip(tables, sequences, strict=True):
            used = sequence.blocks[: -(-sequence.context // block_size)]
            table[: len(used)] = used
        positions = tables[:, keys // block_size] * block_size + keys % block_size
        last = contexts - queries + np.arange(queries)
        mask = keys[None, None, :] <= last[:, :, None]
        written = np.take_along_axis(positions, last, axis=1)
        # Masked keys still multiply by zero, and stale memory may hold NaN: look at the first token instead.
        return np.where(keys < contexts, positions, positions[:, :1]), mask, written

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def attend(self, layer: int, q: torch.Tensor, plan: SdpaPlan) -> torch.Tensor:
        """See :meth:`AttentionBackend.attend`."""
        keys, values = self.layers[layer]
        out = torch.empty_like(q)
        for group in plan.groups:
            out[group.rows] = self._attend_group(q, keys, values, group)
        return out.flatten(1)

    def _attend_group(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _Group) -> torch.Tensor:
        """``[sequences, queries, heads, head_dim]``."""
        query = q[group.rows]
        key = keys[group.positions].transpose(1, 2)
        value = values[group.positions].transpose(1, 2)
        if query.shape[1] == 1:
            # The heads that share keys become queries of one head, so that a decode does not repeat its context.
            shared = query.view(len(query), self.shape.kv_heads, -1, self.shape.head_dim)
            return F.scaled_dot_product_attention(shared, key, value, attn_mask=group.mask).view_as(query)
        grouped = self.shape.heads != self.shape.kv_heads
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=group.mask, enable_gqa=grouped
        )
        return out.transpose(1, 2)
