"""Small steps as CUDA graphs: one launch for a whole step, for any mix of versions.

Tokens of short prompts are rows like decodes: each layer writes the keys and values of all rows before any row attends,
so every token sees those before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deltazip_kernels import Segments
from deltazip_kernels.pick import pick
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
"""Limits of rows, and of context, for steps with prompts: here each row reads its whole context by itself, while the
rows of a prefill share the reads."""


@dataclass(frozen=True)
class _Captured:
    graphs: Sequence[torch.cuda.CUDAGraph]
    """One graph; or one for what precedes the layers and one per layer, the last including what follows."""
    state: tuple[int, int]


class DecodeGraphs:
    """Captures a graph the first time a step of its shape is needed, and replays it from then on.

    Graphs share memory, as only one runs at a time, and write logits to the same place: they must be read on the stream
    of the steps before the next step is launched.
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
        """``drawn`` ``[max rows]`` int64 has the tokens of the previous step, and gets the best ones of each row of
        this one. ``pages``: the maximum of a batch."""
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
        # A separate priority: torch reuses its 32 streams per priority, and a load's stream would be captured too.
        self._stream = torch.cuda.Stream(ops.device, priority=-1)
        self._plans: dict[int, Any] = {}
        self._graphs: dict[StepShape, _Captured] = {}

    def fits(self, batch: Batch) -> bool:
        """Whether every chunk of ``batch`` samples, and is a decode or a short prompt."""
        if len(batch.sampling_chunks) != len(batch.chunks):
            return False
        if len(batch.chunks) == batch.num_tokens:
            return True
        if batch.num_tokens > min(_PROMPT_ROWS, self.sizes[-1]) or batch.scoring_chunks:
            return False
        return all(chunk.start < _PROMPT_CONTEXT for chunk in batch.chunks if len(chunk.tokens) > 1)

    def run(self, batch: Batch, arrivals: Sequence[Arrival]) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch a batch that fits; returns its logits ``[chunks, vocab + added]`` and the best tokens ``[chunks]``.

        ``arrivals``: versions in it that are still being copied; each layer waits for its own weights.
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
        best = self._drawn[: batch.num_tokens]
        if batch.num_tokens == len(batch.chunks):
            return logits, best
        ends = to_device(np.cumsum([len(chunk.tokens) for chunk in batch.chunks]) - 1, logits.device)
        return logits[ends], best[ends]

    @property
    def _vocab(self) -> int:
        return len(self._decoder.head.target.base) + self._decoder.head.added.width

    def _state(self, shape: StepShape) -> tuple[int, int]:
        """A graph is outdated when this changes: the logits' width and, with versions, the kernels for deltas."""
        return self._vocab, self._ops.generation if shape.versions else 0

    def _plan(self, rows: int) -> Any:
        if rows not in self._plans:
            inputs = self._inputs.tensors
            self._plans[rows] = self._attention.captured_plan(inputs["where"][:rows], inputs)
        return self._plans[rows]

    def _capture(self, shape: StepShape, plan: Any) -> _Captured:
        """Capture the step; new kernels are compiled during it."""
        # Read first: if a load changes it during the capture, this graph is outdated.
        state = self._state(shape)
        if not self._graphs:  # a pool is freed with its last graph, and a failed capture counts as one
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.current_blas_handle()  # allocates memory, which is not possible during a capture
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
                graphs[-1].capture_end()  # also after an error, or the stream would stay in capture mode
        here.wait_stream(stream)
        return _Captured(graphs, state)

    def _begin(self, graphs: list[torch.cuda.CUDAGraph]) -> None:
        """Start to capture into a new graph, which is appended to ``graphs``."""
        graphs.append(torch.cuda.CUDAGraph())
        # Other threads may copy deltas to the device at the same time.
        graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _step(self, shape: StepShape, plan: Any, before_layer: Callable[[int | None], None] = go_on) -> None:
        inputs = {name: tensor[: shape.rows] for name, tensor in self._inputs.tensors.items()}
        rows = Rows(inputs["index"])
        if shape.versions:
            starts = self._inputs.tensors["starts"][: shape.versions + 1]
            segments = Segments(starts, self._inputs.tensors["slots"][: shape.versions])
            rows = self._ops.graph_rows(inputs["index"], segments, shape.longest, halves=shape.halves)
        source = inputs["drawn_rows"]
        tokens = torch.where(source >= 0, self._drawn[source.clamp(min=0)], inputs["tokens"]).clamp(min=0)
        logits = self._decoder(StepInputs(tokens, inputs["positions"], rows, plan, None, rows, before_layer))
        self._logits[: shape.rows, : self._vocab].copy_(logits)
        self._drawn[: shape.rows] = pick(logits)
