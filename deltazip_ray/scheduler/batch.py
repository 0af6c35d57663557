"""The work of one step."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from deltazip_ray.kvcache.block_manager import BlockTable
from deltazip_ray.scheduler.request import SamplingParams, TokenLogprobs
from deltazip_ray.scheduler.sequence import SequenceState

TILE_ROWS = 256
"""Rows of a long segment that kernels multiply at once (``deltazip_kernels.device.fused.TALL``). Smaller steps may be
recorded, for which all rows of a slot are together (``engine.decode_graphs``)."""
DRAWN = -1
"""In ``Chunk.tokens``: stands for the token that the previous batch samples for the same sequence.

It exists on the device only: the host learns its value while this batch runs.
"""

_DRAWN: tuple[int, ...] = (DRAWN,)
_NOTHING = range(0)


NOT_FINITE = -1
"""In ``Drawn.tokens``: the logits were not finite."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step sampled."""

    tokens: Sequence[int]
    """One for each of the batch's ``sampling_chunks``, or ``NOT_FINITE``."""
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    """Of those whose requests ask for them, by their place in ``tokens``."""


Scores = Sequence[TokenLogprobs] | None
"""Log-probabilities of the ``targets`` of a chunk; None if the logits were not finite."""


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence that run in a step.

    Token ``i`` of the chunk has position ``start + i`` and attends to positions ``0 .. start + i``. Those before
    ``start`` are in the KV cache once all earlier batches have run. ``block_table`` covers all of them.
    """

    sequence: SequenceState
    tokens: tuple[int, ...]
    """Known tokens, or ``(DRAWN,)``."""
    start: int
    block_table: BlockTable
    samples: bool
    """Whether to sample a token from the logits of the chunk's last token; False before the end of the prompt."""
    drawn_row: int = -1
    """With ``DRAWN``: the index of the chunk that samples it, in the ``sampling_chunks`` of the previous batch."""
    scored: range = _NOTHING
    """Positions whose logits give the log-probability of the prompt's next token, if the request asks for it."""

    @property
    def output_index(self) -> int:
        """Position of that token in the request's whole output; with ``sampling.seed`` it determines the draw."""
        return self.sequence.before + self.start + len(self.tokens)

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.sequence.request.request_id

    @property
    def slot(self) -> int:
        """Slot of the version's delta; -1 for the base."""
        return self.sequence.slot

    @property
    def targets(self) -> Sequence[int]:
        """The prompt's tokens after the ``scored`` positions."""
        return self.sequence.request.prompt[self.scored.start + 1 : self.scored.stop + 1]

    @property
    def sampling(self) -> SamplingParams:
        """How to sample the token."""
        return self.sequence.request.sampling


@dataclass(frozen=True)
class Batch:
    """Chunks, decodes of a slot behind each other and so are prompts. Empty when there is nothing to do."""

    chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> "Batch":
        """``chunks``, which are sorted by slot; in a step of more than TILE_ROWS rows decodes before prompts, and these
        by how many rows a version has, those of the base first.

        Long segments of prompts have products of their own, in whole tiles of rows; all other rows, in front of them,
        are one block to the base's. Decodes of the version whose prompts follow are the first, lest it has one segment.
        """
        batch = cls(tuple(chunks))
        if batch.num_tokens <= max(TILE_ROWS, len(chunks)):
            return batch
        rows: Counter[int] = Counter()
        for chunk in chunks:
            if chunk.slot >= 0 and len(chunk.tokens) > 1:
                rows[chunk.slot] += len(chunk.tokens)
        next_to_decodes = min(sorted(rows), key=rows.__getitem__, default=-1)

        def place(chunk: Chunk) -> tuple[bool, int, int]:
            if len(chunk.tokens) > 1:
                return True, rows[chunk.slot], chunk.slot
            return False, chunk.slot != next_to_decodes, chunk.slot

        return cls(tuple(sorted(chunks, key=place)))

    def __bool__(self) -> bool:
        """Whether there is anything to run."""
        return bool(self.chunks)

    @cached_property
    def num_tokens(self) -> int:
        """Rows of the flat batch."""
        return sum([len(chunk.tokens) for chunk in self.chunks])

    @cached_property
    def sampling_chunks(self) -> tuple[Chunk, ...]:
        """Chunks that sample, in batch order: ``Scheduler.update`` takes one token for each."""
        return tuple([chunk for chunk in self.chunks if chunk.samples])

    @cached_property
    def scoring_chunks(self) -> tuple[Chunk, ...]:
        """Chunks that have ``scored`` positions, in batch order."""
        return tuple([chunk for chunk in self.chunks if chunk.scored])

    @property
    def versions(self) -> int:
        """How many slots it has; the base is one."""
        return len(set(self._segments[1]))

    def segments(self) -> tuple[list[int], list[int]]:
        """Rows by slot: ``starts [S + 1]`` and ``slots [S]``; rows ``starts[i]:starts[i + 1]`` belong to ``slots[i]``.

        A slot may come twice: with decodes, and with prompts.
        """
        return self._segments

    @cached_property
    def _segments(self) -> tuple[list[int], list[int]]:
        starts = [0]
        slots: list[int] = []
        end = 0
        for chunk in self.chunks:
            end += len(chunk.tokens)
            slot = chunk.sequence.slot
            if slots and slots[-1] == slot:
                starts[-1] = end
            else:
                slots.append(slot)
                starts.append(end)
        return starts, slots


def next_chunk(sequence: SequenceState, most: int | None = None) -> Chunk:
    """The next tokens of a running request, ``most`` or all that are pending; they count as scheduled from now on."""
    start, stop = sequence.scheduled, sequence.length
    if most is not None:
        stop = min(stop, start + most)
    if sequence.drawing:
        tokens, row = _DRAWN, sequence.row
    else:
        tokens, row = tuple(sequence.tokens[start:stop]), -1
    samples = stop == sequence.length
    scored = sequence.score(start, stop) if sequence.scored < sequence.score_end else _NOTHING
    # As Chunk(...), which takes twice as long; there is one for each running request in every step.
    chunk = tuple.__new__(Chunk, (sequence, tokens, start, sequence.table, samples, row, scored))
    sequence.scheduled = stop
    sequence.in_flight += 1
    sequence.drawing += samples
    sequence.length += samples
    return chunk
