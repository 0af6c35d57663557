"""Paged attention with torch's scaled_dot_product_attention: for CPUs, and the reference for other backends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deltazip_ray.layers.attention.backend import AttentionBackend, SequenceRows


@dataclass(frozen=True)
class _Group:
    """Sequences with the same number of rows, computed as one padded batch."""

    rows: torch.Tensor
    """``[sequences, queries]``: rows of the step."""
    positions: torch.Tensor
    """``[sequences, keys]``: cache positions of their tokens."""
    masks: Mapping[int | None, torch.Tensor]
    """By window: ``[sequences, 1, queries, keys]``, True where a query may attend."""


@dataclass(frozen=True)
class SdpaPlan:
    """The plan of one step."""

    where: torch.Tensor
    """``[rows]`` int64: cache positions for each row's key and value."""
    groups: tuple[_Group, ...]


class SdpaBackend(AttentionBackend[SdpaPlan]):
    """Gathers the contexts in every step."""

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
            positions, masks, written = self._contexts([sequences[i] for i in indices], queries)
            write[rows] = written
            sent = {window: self._tensor(mask)[:, None] for window, mask in masks.items()}
            groups.append(_Group(self._tensor(rows), self._tensor(positions), sent))
        return SdpaPlan(self._tensor(write), tuple(groups))

    def _contexts(
        self, sequences: list[SequenceRows], queries: int
    ) -> tuple[np.ndarray, dict[int | None, np.ndarray], np.ndarray]:
        """Cache positions ``[n, keys]``, masks ``[n, queries, keys]``, and the positions ``[n, queries]`` to write."""
        block_size = self.shape.block_size
        contexts = np.array([sequence.context for sequence in sequences])[:, None]
        keys = np.arange(contexts.max())
        tables = np.zeros((len(sequences), -(-len(keys) // block_size)), dtype=np.int64)
        for table, sequence in zip(tables, sequences, strict=True):
            used = sequence.blocks[: -(-sequence.context // block_size)]
            table[: len(used)] = used
        positions = tables[:, keys // block_size] * block_size + keys % block_size
        last = contexts - queries + np.arange(queries)
        behind = last[:, :, None] - keys[None, None, :]
        windows = set(self.shape.windows) or {None}
        masks = {w: (behind >= 0) if w is None else (behind >= 0) & (behind < w) for w in windows}
        written = np.take_along_axis(positions, last, axis=1)
        # Masked keys are multiplied by zero, and stale memory may contain NaN: read the first token instead.
        return np.where(keys < contexts, positions, positions[:, :1]), masks, written

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def attend(self, layer: int, q: torch.Tensor, plan: SdpaPlan) -> torch.Tensor:
        """See :meth:`AttentionBackend.attend`."""
        out = torch.empty_like(q)
        for group in plan.groups:
            mask = group.masks[self.shape.window(layer)]
            key, value = (found.transpose(1, 2) for found in self.layers[layer].read(group.positions, self.dtype))
            out[group.rows] = self._attend_group(q[group.rows], key, value, mask)
        return out.flatten(1)

    def _attend_group(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """``query`` and the result ``[sequences, queries, heads, head_dim]``, the others with heads before tokens."""
        shape = self.shape
        if shape.softcap is not None:
            return self._attend_capped(query, key, value, mask, shape.softcap)
        if query.shape[1] == 1:
            # Heads that share keys become queries of one head, so that a decode does not repeat its context.
            shared = query.view(len(query), shape.kv_heads, -1, shape.head_dim)
            out = F.scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=shape.scale)
            return out.reshape(query.shape)
        grouped = shape.heads != shape.kv_heads
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=mask, scale=shape.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    def _attend_capped(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, cap: float
    ) -> torch.Tensor:
        """Attention with explicit scores, as torch's has no soft caps."""
        shape = self.shape
        shared = query.transpose(1, 2).unflatten(1, (shape.kv_heads, -1))
        scale = shape.head_dim**-0.5 if shape.scale is None else shape.scale
        scores = (shared @ key[:, :, None].mT).float() * scale
        scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask[:, :, None], -torch.inf)
        out = scores.softmax(-1).to(value.dtype) @ value[:, :, None]
        return out.flatten(1, 2).transpose(1, 2)
