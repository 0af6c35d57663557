"""Runs steps without requests, so that kernels are compiled and graphs recorded before the first request.

Only before the first real step. Keys and values go to the padding block, which no request has.
"""

from array import array
from collections.abc import Sequence

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.arrivals import Arrival
from deltazip_ray.engine.runner import ModelRunner
from deltazip_ray.engine.step_shapes import mixtures, numbers_of_versions
from deltazip_ray.scheduler.batch import Batch, Chunk
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams
from deltazip_ray.scheduler.sequence import SequenceState

_GREEDY = SamplingParams(temperature=0.0)
_PROMPTS = (
    (128, SamplingParams(top_k=20, top_p=0.9, min_p=0.01, logprobs=1)),
    (101, SamplingParams(logit_bias=((0, 0.0),))),
)
"""Rows of the prompts, as kernels are compiled separately for multiples of 16 and for other numbers, and how they draw:
edited logits are float32."""


def run_steps(runner: ModelRunner, config: EngineConfig) -> None:
    """Run a prefill, and a prefill together with a decode, of the base."""
    most = min(config.max_batch_tokens, config.max_model_len - 1)
    for rows, sampling in ((min(rows, most), sampling) for rows, sampling in _PROMPTS):
        _run(runner, [_chunk(runner, rows, _GREEDY)])
        if 1 < rows < config.max_batch_tokens and config.max_running > 1:
            _run(runner, [_chunk(runner, 1, _GREEDY), _chunk(runner, rows, sampling)])


def record_graphs(runner: ModelRunner, slots: int) -> None:
    """Run all steps that can be recorded with the base and up to ``slots`` versions; with a single version also as if
    it were still being copied."""
    for rows in runner.graph_sizes:
        _run(runner, [_chunk(runner, 1, _GREEDY) for _ in range(rows)])
        for versions in numbers_of_versions(min(rows, slots)):
            for lengths in mixtures(rows, versions):
                runs = enumerate((rows - sum(lengths), *lengths), -1)
                _run(runner, [_chunk(runner, 1, _GREEDY, slot) for slot, length in runs for _ in range(length)])
        if slots:
            _run(runner, [_chunk(runner, 1, _GREEDY, 0) for _ in range(rows)], [Arrival({}, None)])


def _run(runner: ModelRunner, chunks: Sequence[Chunk], arrivals: Sequence[Arrival] = ()) -> None:
    runner.launch(Batch(tuple(chunks)), arrivals).wait()


def _chunk(runner: ModelRunner, rows: int, sampling: SamplingParams, slot: int = -1) -> Chunk:
    """A prompt of ``rows`` tokens for the base, or for an empty ``slot``."""
    sequence = SequenceState(GenerateRequest("warm-up", None, (0,) * rows, sampling), slot)
    blocks = -(-rows // runner.attention.shape.block_size)
    return Chunk(sequence, sequence.request.prompt, 0, array("i", [runner.attention.padding]) * blocks, samples=True)
