"""Steps of few rows as CUDA graphs: one launch for a whole step, whichever versions share it.

A token of a short prompt is a row as a decode is: it sees the keys and values before it, which every layer writes for
all rows before any of them attends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deltazip_kernels import Segments
from deltazip_ray.engine.arrivals import Arrival, wait_for_layer
from deltazip_ray.engine.step_inputs import RecordedInputs
from deltazip_ray.engine.step_shapes import StepShape, step_sizes
from deltazip_ray.layers.attention.capture import CapturableBackend
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.staging import to_device
from deltazip_ray.layers.triton_ops import TritonOps
from deltazip_ray.models.decoder import Decoder, StepInputs, go_on
from deltazip_ray.scheduler.batch import Batch

_PROMPT_ROWS, _PROMPT_CONTEXT = 256, 1024
"""Rows of a step with prompts, and what one may see: each row reads all of it, where a prefill's rows share it."""


@dataclass(frozen=True)
class _Captured:
    graphs: Sequence[torch.cuda.CUDAGraph]
    """One, or what comes before the layers and each layer, the last with what comes behind it."""
    state: tuple[int, int]


class DecodeGraphs:
    """Captures a graph when a step first needs one of its shape, and replays it from then on.

    Graphs share their memory, since one runs at a time, and write logits to one place: whoever reads them does so on
    the stream of the steps, before the next is launched.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: CapturableBackend[Any],
        ops: TritonOps,
        drawn: torch.Tensor,
        slots: int,
        pages: int,
    ) -> None:
        """``drawn`` ``[most rows]`` int64 holds the tokens of the step before; ``pages``: the most of a whole batch."""
        self._decoder = decoder
        self._attention = attention
        self._ops = ops
        self._drawn = drawn
        most = len(drawn)
        self.sizes = step_sizes(most)
        self._inputs = RecordedInputs(attention, ops.device, most, slots, pages)
        vocab = len(decoder.head.target.base) + decoder.head.added.table.shape[1]
        self._logits = torch.empty((most, vocab), dtype=ops.dtype, device=ops.device)
        self._slots = slots
        self._pool = torch.cuda.graph_pool_handle()
        # Torch hands its 32 streams of one priority out in turn: one of a load's would be recorded with the step.
        self._stream = torch.cuda.Stream(ops.device, priority=-1)
        self._plans: dict[int, Any] = {}
        self._graphs: dict[StepShape, _Captured] = {}

    def fits(self, batch: Batch) -> bool:
        """Whether every chunk of ``batch`` samples, and is one token or part of few short prompts."""
        if len(batch.sampling_chunks) != len(batch.chunks):
            return False
        if len(batch.chunks) == batch.num_tokens:
            return True
        if batch.num_tokens > min(_PROMPT_ROWS, self.sizes[-1]) or batch.scoring_chunks:
            return False
        return all(chunk.start < _PROMPT_CONTEXT for chunk in batch.chunks if len(chunk.tokens) > 1)

    def run(self, batch: Batch, arrivals: Sequence[Arrival]) -> torch.Tensor:
        """Launch a batch that fits; returns its logits ``[chunks, vocab + added]``.

        ``arrivals``: versions in it that are on their way; each layer waits for its own weights.
        """
        rows = next(size for size in self.sizes if size >= batch.num_tokens)
        plan = self._plan(rows)
        shape = StepShape.of(rows, self._inputs.fill(batch, rows), self._slots, arriving=bool(arrivals))
        captured = self._graphs.get(shape)
        if captured is None or captured.state != self._state(shape):
            for arrival in arrivals:
                arrival.wait_for_all()
            captured = self._graphs[shape] = self._capture(shape, plan)
        for layer, graph in zip((None, *range(len(self._decoder.blocks))), captured.graphs, strict=False):
            wait_for_layer(arrivals, layer)
            graph.replay()
        logits = self._logits[: batch.num_tokens, : self._vocab]
        if batch.num_tokens == len(batch.chunks):
            return logits
        ends = np.cumsum([len(chunk.tokens) for chunk in batch.chunks])
        return logits[to_device(ends - 1, logits.device)]

    @property
    def _vocab(self) -> int:
        return len(self._decoder.head.target.base) + self._decoder.head.added.width

    def _state(self, shape: StepShape) -> tuple[int, int]:
        """What makes recorded launches old: wider logits, and where versions take part, more kinds of deltas."""
        return self._vocab, self._ops.generation if shape.versions else 0

    def _plan(self, rows: int) -> Any:
        if rows not in self._plans:
            inputs = self._inputs.tensors
            self._plans[rows] = self._attention.captured_plan(inputs["where"][:rows], inputs)
        return self._plans[rows]

    def _capture(self, shape: StepShape, plan: Any) -> _Captured:
        """Record the step. Kernels that are new are compiled meanwhile."""
        # Read first: a load that changes them meanwhile makes this graph an old one.
        state = self._state(shape)
        if not self._graphs:  # a pool ends with the last of its graphs, as which one counts whose capture failed
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.current_blas_handle()  # which takes memory, which a recording must not
        here, stream = torch.cuda.current_stream(), self._stream
        stream.wait_stream(here)
        graphs: list[torch.cuda.CUDAGraph] = []

        def cut(layer: int | None) -> None:
            if shape.arriving and layer is not None:
                graphs[-1].capture_end()
                self._begin(graphs)

        with torch.cuda.stream(stream):
            self._begin(graphs)
            try:
                self._step(shape, plan, cut)
            finally:
                graphs[-1].capture_end()  # or the stream would go on recording
        here.wait_stream(stream)
        return _Captured(graphs, state)

    def _begin(self, graphs: list[torch.cuda.CUDAGraph]) -> None:
        """Record what is launched from now on in a new graph, the last of ``graphs``."""
        graphs.append(torch.cuda.CUDAGraph())
        # Other threads copy deltas to the device meanwhile.
        graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _step(self, shape: StepShape, plan: Any, before_layer: Callable[[int | None], None] = go_on) -> None:
        inputs = {name: tensor[: shape.rows] for name, tensor in self._inputs.tensors.items()}
        rows = Rows(inputs["index"])
        if shape.versions:
            starts = self._inputs.tensors["starts"][: shape.versions + 1]
            segments = Segments(starts, self._inputs.tensors["slots"][: shape.versions])
            rows = self._ops.graph_rows(inputs["index"], segments, shape.longest, halves=shape.halves)
        source = inputs["drawn_rows"]
        tokens = torch.where(source >= 0, self._drawn[source.clamp(min=0)], inputs["tokens"])
        logits = self._decoder(StepInputs(tokens, inputs["positions"], rows, plan, None, rows, before_layer))
        self._logits[: shape.rows, : self._vocab].copy_(logits)
