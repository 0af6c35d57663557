"""A token to sample, and the state that its request keeps between tokens."""

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from deltazip_ray.scheduler.batch import Chunk
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

_COLDEST = 1e-30  # lower temperatures make no difference, and do not fit into float32


class DrawState:
    """What the draws of one sequence depend on besides its logits. Updated by the step thread."""

    def __init__(self, request: GenerateRequest) -> None:
        self.matcher = request.matcher
        """Follows the output's structure, if it has one."""
        self.tokens = array("i")
        """Distinct tokens of prompt and output."""
        self.counts = array("i")
        """Occurrences of each in the output."""
        self._places: dict[int, int] = {}
        self._counts_all = request.sampling.penalized
        self._output = len(request.prompt) - request.output_offset
        self._known = 0

    def advance(self, tokens: Sequence[int]) -> None:
        """Update to ``tokens``, which are all tokens of the sequence."""
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
    """What all draws of a request have in common, computed once."""

    edits: bool
    seed: int
    numbers: tuple[float, float, float, float]
    """Temperature (0 if greedy), top-k (infinite for all), top-p, min-p."""

    @classmethod
    def of(cls, params: SamplingParams) -> "Traits":
        """The traits of requests with these parameters."""
        temperature = 0.0 if params.greedy else max(params.temperature, _COLDEST)
        numbers = (temperature, params.top_k or math.inf, params.top_p, params.min_p)
        return cls(params.edits, params.seed, numbers)


class Draw(NamedTuple):
    """A token to sample: its request's parameters, and its position in the request's whole output."""

    params: SamplingParams
    position: int
    traits: Traits
    state: DrawState | None = None
    """Needed if ``params.sequential``."""

    @classmethod
    def at(cls, params: SamplingParams, position: int, state: DrawState | None = None) -> "Draw":
        """A single draw."""
        return cls(params, position, Traits.of(params), state)

    @classmethod
    def of(cls, chunk: Chunk) -> "Draw":
        """The draw of a chunk that samples; its sequence keeps the state for the next one."""
        sequence, params = chunk.sequence, chunk.sampling
        if sequence.draw_state is None:
            state = DrawState(sequence.request) if sequence.sequential else None
            sequence.draw_state = Traits.of(params), state
        traits, state = sequence.draw_state
        if state is not None:
            state.advance(sequence.tokens)
        return cls(params, chunk.output_index, traits, state)
