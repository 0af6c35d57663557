"""The work of one step."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltazip_ray.scheduler.request import SamplingParams
from deltazip_ray.scheduler.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that was drawn, and what its request wanted to know of it."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log probabilities, the best first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence that run in a step.

    Token ``i`` of the chunk has position ``start + i``; it attends to positions ``0 .. start + i``, of which those
    before ``start`` are in the KV cache. ``block_table`` covers all of them.
    """

    sequence: SequenceState
    tokens: tuple[int, ...]
    start: int
    block_table: Sequence[int]
    samples: bool
    """Whether a token is drawn from the logits of the chunk's last token; False before the end of the prompt."""

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.sequence.request.request_id

    @property
    def slot(self) -> int:
        """Slot of the version's delta; -1 for the base."""
        return self.sequence.slot

    @property
    def sampling(self) -> SamplingParams:
        """How to draw the token."""
        return self.sequence.request.sampling

    @property
    def output_index(self) -> int:
        """Output position of the token to draw: with ``sampling.seed`` it determines the draw."""
        return self.sequence.output_index


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks sorted by slot (the base, -1, first), and by arrival within a slot. Empty when there is nothing to do."""

    chunks: tuple[Chunk, ...]

    def __bool__(self) -> bool:
        """Whether there is anything to run."""
        return bool(self.chunks)

    @property
    def num_tokens(self) -> int:
        """Rows of the flat batch."""
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def sampling_chunks(self) -> tuple[Chunk, ...]:
        """Chunks that sample, in batch order: ``Scheduler.update`` takes one token for each."""
        return tuple(chunk for chunk in self.chunks if chunk.samples)

    def segments(self) -> tuple[list[int], list[int]]:
        """Rows by slot: ``starts [S + 1]`` and ``slots [S]``; rows ``starts[i]:starts[i + 1]`` belong to ``slots[i]``.

        Slots ascend and none comes twice.
        """
        starts = [0]
        slots: list[int] = []
        end = 0
        for chunk in self.chunks:
            end += len(chunk.tokens)
            if slots and slots[-1] == chunk.slot:
                starts[-1] = end
            else:
                slots.append(chunk.slot)
                starts.append(end)
        return starts, slots
