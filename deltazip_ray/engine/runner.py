"""Runs the batches that the scheduler makes."""

from typing import Any

import torch

from deltazip_ray.engine.sampling import Draw, SamplingBatch, sample
from deltazip_ray.layers.attention.backend import AttentionBackend, SequenceRows
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.models.decoder import Decoder, StepInputs
from deltazip_ray.scheduler.batch import Batch


class ModelRunner:
    """A step in three parts, so that a device may compute one while the host prepares the next:

    ``prepare`` (host), ``decoder(inputs)`` (device), ``sample`` (device, then one transfer of tokens).
    """

    def __init__(self, decoder: Decoder, attention: AttentionBackend[Any], ops: LayerOps, device: torch.device) -> None:
        self.decoder = decoder
        self.attention = attention
        self.ops = ops
        self.device = device

    def run(self, batch: Batch) -> list[int | None]:
        """One token for each of ``batch.sampling_chunks``; None where the logits are not finite."""
        with torch.inference_mode():
            logits = self.decoder(self.prepare(batch))
            draws = [Draw(chunk.sampling, chunk.output_index) for chunk in batch.sampling_chunks]
            if not draws:
                return []
            drawn = sample(logits, SamplingBatch.of(draws, self.device)).fetch()
            return [None if one is None else one.token for one in drawn]

    def prepare(self, batch: Batch) -> StepInputs:
        """The batch as tensors."""
        tokens: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for chunk in batch.chunks:
            tokens.extend(chunk.tokens)
            positions.extend(range(chunk.start, chunk.start + len(chunk.tokens)))
            if chunk.samples:
                last.append(len(tokens) - 1)
        plan = self.attention.plan(
            [SequenceRows(len(c.tokens), c.start + len(c.tokens), c.block_table) for c in batch.chunks]
        )
        return StepInputs(
            tokens=torch.tensor(tokens).to(self.device),
            positions=torch.tensor(positions).to(self.device),
            rows=self.ops.rows([(c.slot, len(c.tokens)) for c in batch.chunks], self.device),
            plan=plan,
            last=torch.tensor(last, dtype=torch.int64).to(self.device),
            last_rows=self.ops.rows([(c.slot, 1) for c in batch.sampling_chunks], self.device),
        )
