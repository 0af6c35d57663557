"""One token to draw, and what its request remembers of those before it."""

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from deltazip_ray.scheduler.batch import Chunk
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

_COLDEST = 1e-30  # a lower temperature is no different, and would not be a float32


class DrawState:
    """What the draws of one sequence depend on beside its logits. The step thread brings it up to date."""

    def __init__(self, request: GenerateRequest) -> None:
        self.matcher = request.matcher
        """Follows the output's structure; None where any text will do."""
        self.tokens = array("i")
        """Distinct tokens of prompt and output."""
        self.counts = array("i")
        """How often each is in the output."""
        self._places: dict[int, int] = {}
        self._counts_all = request.sampling.penalized
        self._output = len(request.prompt) - request.output_offset
        self._known = 0

    def advance(self, tokens: Sequence[int]) -> None:
        """Take note of the sequence's ``tokens``, all of them, as far as they are new."""
        for position in range(self._known, len(tokens)):
            made = position >= self._output
            if self._counts_all:
                self._count(tokens[position], made)
            if self.matcher is not None and made:
                self.matcher.accept(tokens[position])
        self._known = len(tokens)

    def _count(self, token: int, made: bool) -> None:
        place = self._places.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(0)
        self.counts[place] += made


class Traits(NamedTuple):
    """What all draws of a request have in common, worked out once."""

    random: tuple[bool, bool] | None
    """None for greedy ones; else whether top-k or top-p cut anything off, and whether min-p does."""
    edits: bool
    seed: int
    numbers: tuple[float, float, float, float]
    """Temperature, top-k (infinite for all), top-p, min-p."""

    @classmethod
    def of(cls, params: SamplingParams) -> "Traits":
        """Those of a request with these parameters."""
        random = None if params.greedy else (params.top_k > 0 or params.top_p < 1, params.min_p > 0)
        numbers = (max(params.temperature, _COLDEST), params.top_k or math.inf, params.top_p, params.min_p)
        return cls(random, params.edits, params.seed, numbers)


class Draw(NamedTuple):
    """One token to draw: the parameters of its request and its position in the request's whole output."""

    params: SamplingParams
    position: int
    traits: Traits
    state: DrawState | None = None
    """Needed where ``params.sequential``."""

    @classmethod
    def at(cls, params: SamplingParams, position: int, state: DrawState | None = None) -> "Draw":
        """A single draw."""
        return cls(params, position, Traits.of(params), state)

    @classmethod
    def of(cls, chunk: Chunk) -> "Draw":
        """The draw of a chunk that samples. Its sequence keeps what the next one needs."""
        sequence, params = chunk.sequence, chunk.sampling
        if sequence.draw_state is None:
            state = DrawState(sequence.request) if sequence.sequential else None
            sequence.draw_state = Traits.of(params), state
        traits, state = sequence.draw_state
        if state is not None:
            state.advance(sequence.tokens)
        return cls(params, chunk.output_index, traits, state)
