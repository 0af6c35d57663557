"""Runs the scheduler's batches on the device."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from deltazip_ray.engine.arrivals import Arrival, wait_for_layer
from deltazip_ray.engine.sampling import PromptScores, SampledTokens, StepDraws, sample
from deltazip_ray.layers.attention.backend import AttentionBackend, SequenceRows
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.layers.staging import to_device
from deltazip_ray.models.decoder import Decoder, StepInputs
from deltazip_ray.scheduler.batch import Batch, Drawn, Scores


class StepGraphs(Protocol):
    """Recorded steps: see :class:`~deltazip_ray.engine.decode_graphs.DecodeGraphs`."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The possible numbers of rows."""

    def fits(self, batch: Batch) -> bool:
        """Whether ``batch`` can run as a recorded step."""

    def run(self, batch: Batch, arrivals: Sequence[Arrival]) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch ``batch``, which waits for ``arrivals``; returns logits ``[sampled, vocab + added]`` and the best
        tokens ``[sampled]``, as :func:`deltazip_kernels.pick.pick` does."""


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A launched step."""

    sampled: SampledTokens | None
    """None if no chunk samples."""
    prompts: PromptScores | None
    """None if no prompt logprobs are requested."""
    done: torch.cuda.Event | None
    """An event after the step, if it is on a GPU and ``sampled`` is None."""

    def wait(self) -> Drawn:
        """See :class:`~deltazip_ray.engine.step_loop.Launched`."""
        if self.done is not None:
            self.done.synchronize()
        return Drawn(()) if self.sampled is None else self.sampled.fetch()

    def scores(self) -> list[Scores]:
        """See :class:`~deltazip_ray.engine.step_loop.Launched`."""
        return [] if self.prompts is None else self.prompts.fetch()


class ModelRunner:
    """Launches steps: inputs, logits, tokens. Never waits for the device.

    Sampled tokens stay on the device for the next step, which may be launched before the host knows them.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend[Any],
        ops: LayerOps,
        drawn: torch.Tensor,
        graphs: StepGraphs | None,
        arriving: Callable[[Iterable[int]], Sequence[Arrival]],
    ) -> None:
        """``drawn`` ``[max running]`` int64 keeps the tokens of the last step. ``graphs``, if given, run small steps.

        ``arriving`` finds versions that are still being copied to slots.
        """
        self.decoder = decoder
        self.attention = attention
        self.ops = ops
        self.device = drawn.device
        self._drawn = drawn
        self._draws = StepDraws(drawn.device)
        self._graphs = graphs
        self._arriving = arriving

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """The numbers of rows that can be recorded."""
        return () if self._graphs is None else self._graphs.sizes

    def launch(self, batch: Batch, arrivals: Sequence[Arrival] | None = None) -> LaunchedStep:
        """See :class:`~deltazip_ray.engine.step_loop.StepRunner`. ``arrivals`` replaces what ``arriving`` finds."""
        with torch.inference_mode():
            if arrivals is None:
                arrivals = self._arriving(set(batch.segments()[1]))
            sampled, prompts = self._run(batch, arrivals)
        if sampled is not None or self.device.type != "cuda":
            return LaunchedStep(sampled, prompts, None)
        done = torch.cuda.Event(blocking=True)
        done.record()
        return LaunchedStep(sampled, prompts, done)

    def synchronize(self) -> None:
        """Wait until the device is idle. Raises RuntimeError when it is lost."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(self, batch: Batch) -> StepInputs:
        """The batch as tensors."""
        tokens: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        drawn: dict[int, int] = {}
        for chunk in batch.chunks:
            if chunk.drawn_row >= 0:
                drawn[len(tokens)] = chunk.drawn_row
            tokens.extend(chunk.tokens)
            positions.extend(range(chunk.start, chunk.start + len(chunk.tokens)))
            if chunk.samples:
                last.append(len(tokens) - 1)
        on_device = self._send(tokens)
        if drawn:
            on_device[self._send(list(drawn))] = self._drawn[self._send(list(drawn.values()))].clamp(min=0)
        sequences = [SequenceRows(len(c.tokens), c.start + len(c.tokens), c.block_table) for c in batch.chunks]
        return StepInputs(
            tokens=on_device,
            positions=self._send(positions),
            rows=self.ops.rows([(c.slot, len(c.tokens)) for c in batch.chunks], self.device),
            plan=self.attention.plan(sequences),
            last=self._send(last),
            last_rows=self.ops.rows([(c.slot, 1) for c in batch.sampling_chunks], self.device),
        )

    def _run(self, batch: Batch, arrivals: Sequence[Arrival]) -> tuple[SampledTokens | None, PromptScores | None]:
        if self._graphs is not None and self._graphs.fits(batch):
            return self._sample(batch, *self._graphs.run(batch, arrivals)), None
        inputs = replace(self.prepare(batch), before_layer=functools.partial(wait_for_layer, arrivals))
        states = self.decoder.states(inputs)
        prompts = None
        if batch.scoring_chunks:
            prompts = PromptScores.of(batch, functools.partial(self._logits, states), len(self._drawn))
        logits = self.decoder.logits(states, inputs.last, inputs.last_rows)
        return self._sample(batch, logits) if batch.sampling_chunks else None, prompts

    def _logits(
        self, states: tuple[torch.Tensor, torch.Tensor], rows: Sequence[int], runs: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """Logits of ``rows`` of a step; ``runs`` are (slot, number of rows)."""
        return self.decoder.logits(states, self._send(rows), self.ops.rows(runs, self.device)).float()

    def _send(self, values: Sequence[int]) -> torch.Tensor:
        return to_device(np.array(values, dtype=np.int64), self.device)

    def _sample(self, batch: Batch, logits: torch.Tensor, best: torch.Tensor | None = None) -> SampledTokens:
        sampled = sample(logits, self._draws.stage(batch), best)
        if sampled.tokens is not best or len(batch.chunks) != batch.num_tokens:
            self._drawn[: len(sampled.tokens)] = sampled.tokens
        return sampled
