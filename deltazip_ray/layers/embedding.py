"""Token embedding and output head, with deltas and with tokens that only some versions have."""

import torch
import torch.nn.functional as F

from deltazip_kernels import RAW, PackedDelta, delta_matmul, unpack_rows
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.targets import VALUES, AddedTarget, MatrixTarget


class DeltaEmbedding:
    """Embedding ``[vocab, hidden]``; token ``vocab + i`` is the version's own added row ``i``."""

    def __init__(self, weight: torch.Tensor, target: MatrixTarget, added: AddedTarget) -> None:
        self.weight = weight
        self.target = target
        self.added = added

    def __call__(self, tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``tokens`` ``[rows]`` int64, each inside its version's vocabulary, to ``[rows, hidden]``."""
        vocab = len(self.weight)
        known = tokens.clamp(max=vocab - 1)
        hidden = F.embedding(known, self.weight)
        for span in rows.spans:
            here = slice(span.start, span.stop)
            delta = self.target.deltas[span.slot]
            if delta is not None:
                hidden[here] += _delta_rows(delta, known[here]).to(hidden.dtype)
        if any(self.added.counts[span.slot] for span in rows.spans):
            own = self.added.table[rows.index, (tokens - vocab).clamp(min=0)]
            hidden = torch.where((tokens >= vocab)[:, None], own, hidden)
        return hidden


class DeltaHead:
    """Logits over the base's vocabulary and each version's added tokens."""

    def __init__(self, weight: torch.Tensor, target: MatrixTarget, added: AddedTarget, *, backend: str) -> None:
        """For tied weights these are the embedding's own."""
        self.weight = weight
        self.target = target
        self.added = added
        self.backend = backend

    def __call__(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``hidden`` ``[rows, hidden]`` to float32 logits ``[rows, vocab + most added]``; -inf where a version ends."""
        logits = F.linear(hidden, self.weight)
        if rows.spans:
            delta_matmul(logits, hidden, self.target.deltas, rows.segments, backend=self.backend)
        widest = max((self.added.counts[span.slot] for span in rows.spans), default=0)
        if widest == 0:
            return logits.float()
        vocab = len(self.weight)
        wide = torch.full((len(hidden), vocab + widest), -torch.inf, dtype=torch.float32, device=hidden.device)
        wide[:, :vocab] = logits
        for span in rows.spans:
            count = self.added.counts[span.slot]
            here = slice(span.start, span.stop)
            wide[here, vocab : vocab + count] = F.linear(hidden[here], self.added.table[span.slot + 1, :count]).float()
        return wide


def _delta_rows(delta: PackedDelta, tokens: torch.Tensor) -> torch.Tensor:
    """Rows ``tokens`` of a delta, ``[tokens, hidden]``."""
    if delta.codec == RAW:
        return F.embedding(tokens, delta.tensors[VALUES])
    return unpack_rows(delta.codec, delta.tensors, delta.shape, tokens)
