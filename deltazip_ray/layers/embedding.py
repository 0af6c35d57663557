"""Token embedding and output head, with deltas and with tokens that versions add."""

import torch
import torch.nn.functional as F

from deltazip_ray.layers.activations import Activations, dense
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.targets import AddedTarget, MatrixTarget


class DeltaEmbedding:
    """Embedding ``[vocab, hidden]``; token ``vocab + i`` is the version's own added row ``i``."""

    def __init__(self, target: MatrixTarget, added: AddedTarget) -> None:
        self.target = target
        self.weight = dense(target.base, added.table.dtype)
        self.added = added

    def __call__(self, tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``tokens`` ``[rows]`` int64, each inside its version's vocabulary, to ``[rows, hidden]``."""
        vocab = len(self.weight)
        hidden = F.embedding(tokens.clamp(max=vocab - 1), self.weight)
        self.target.stack.add_weights(hidden, tokens, rows)
        if self.added.width:
            own = self.added.table[rows.index, (tokens - vocab).clamp(min=0)]
            hidden = torch.where((tokens >= vocab)[:, None], own, hidden)
        return hidden


class DeltaHead:
    """Logits over the base's vocabulary and each version's added tokens."""

    def __init__(self, target: MatrixTarget, added: AddedTarget, ops: LayerOps, softcap: float | None = None) -> None:
        """Tied weights have the targets of the embedding. ``softcap``: logits ``x`` become ``cap * tanh(x / cap)``."""
        self.target = target
        self.added = added
        self.ops = ops
        self.softcap = softcap

    def __call__(self, hidden: Activations, rows: Rows) -> torch.Tensor:
        """``hidden`` ``[rows, hidden]`` to logits ``[rows, vocab + max added]``; -inf for tokens a version lacks."""
        logits = self._capped(self.ops.linear(self.target.base, hidden, self.target.stack, rows))
        width = self.added.width
        if width == 0:
            return logits
        own = self._capped(torch.einsum("rh,rah->ra", hidden.values, self.added.table[rows.index, :width]))
        known = torch.arange(width, device=own.device) < self.added.counts[rows.index, None]
        return torch.cat((logits, own.where(known, -torch.inf)), dim=1)

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        if self.softcap is None:
            return logits
        return (self.softcap * torch.tanh(logits.float() / self.softcap)).to(logits.dtype)
