"""Runs the batches that the scheduler makes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from deltazip_ray.engine.sampling import Draw, SamplingBatch, sample
from deltazip_ray.layers.attention.backend import AttentionBackend, SequenceRows
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.models.decoder import Decoder, StepInputs
from deltazip_ray.scheduler.batch import Batch, Chunk, Drawn


@dataclass(frozen=True, slots=True)
class RanStep:
    """A step that ran when it was launched."""

    drawn: list[Drawn | None]

    def wait(self) -> list[Drawn | None]:
        """See :class:`~deltazip_ray.engine.step_loop.Launched`."""
        return self.drawn


class ModelRunner:
    """A step in three parts, so that a device may compute one while the host prepares the next:

    ``prepare`` (host), ``decoder(inputs)`` (device), ``sample`` (device, then one transfer of tokens).
    """

    def __init__(self, decoder: Decoder, attention: AttentionBackend[Any], ops: LayerOps, device: torch.device) -> None:
        self.decoder = decoder
        self.attention = attention
        self.ops = ops
        self.device = device
        self._drawn: list[Drawn | None] = []

    def launch(self, batch: Batch) -> RanStep:
        """Run a batch; see :class:`~deltazip_ray.engine.step_loop.StepRunner`."""
        with torch.inference_mode():
            logits = self.decoder(self.prepare(batch))
            draws = [Draw.of(chunk) for chunk in batch.sampling_chunks]
            self._drawn = sample(logits, SamplingBatch.of(draws, self.device)).fetch() if draws else []
        return RanStep(self._drawn)

    def synchronize(self) -> None:
        """Wait until the device is idle. Raises RuntimeError when it is lost."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(self, batch: Batch) -> StepInputs:
        """The batch as tensors."""
        tokens: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for chunk in batch.chunks:
            tokens.extend(self._tokens(chunk))
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

    def _tokens(self, chunk: Chunk) -> Iterable[int]:
        """The tokens of a chunk, with what the step before drew in place of ``DRAWN``."""
        if chunk.drawn_row is None:
            return chunk.tokens
        drawn = self._drawn[chunk.drawn_row]
        # A sequence without finite logits is about to fail: until that is known, any token will do.
        return (0 if drawn is None else drawn.token,)
