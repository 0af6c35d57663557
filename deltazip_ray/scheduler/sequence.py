"""What the scheduler knows about one request."""

from array import array
from typing import Any

from deltazip_ray.kvcache.block_names import BlockNames
from deltazip_ray.scheduler.request import FinishReason, GenerateRequest, TokenChunk, TokenLogprobs


class SequenceState:
    """A request on its way: its tokens so far and how many of them were given to a batch.

    Prefill, decode and recompute after a preemption are one thing here: ``pending`` tokens have to run, and the step
    that runs the last of them draws the next one. While that step is on its way the token counts, but its value is
    not known (``drawing``).
    """

    __slots__ = (
        "_before",
        "_complete",
        "_stops",
        "draw_state",
        "drawing",
        "in_flight",
        "length",
        "logprobs",
        "named",
        "names",
        "order",
        "over",
        "paid",
        "plain",
        "request",
        "row",
        "scheduled",
        "score_end",
        "scored",
        "scores",
        "sequential",
        "slot",
        "table",
        "tokens",
        "told",
    )

    def __init__(self, request: GenerateRequest, slot: int, block_size: int = 1) -> None:
        """``slot``: where the version's delta is on the device; -1 for the base."""
        self.request = request
        self.slot = slot
        self.tokens = list(request.prompt)
        """Known tokens: prompt and output."""
        self.told = self.length = len(self.tokens)
        """Of these, how many the request was given or gave itself; and tokens so far, those being drawn included."""
        self.scheduled = 0
        """Tokens, from the first on, that are in the KV cache or in a batch on its way."""
        self.drawing = 0
        """Batches on their way that draw tokens after ``tokens``: not more than one, when a step is scheduled."""
        self.row = 0
        """Which of the last one's sampling chunks does."""
        self.in_flight = 0
        """Batches on their way that have tokens of this sequence."""
        self.over = False
        """Finished, failed or aborted: what batches on their way bring is dropped."""
        self.table = array("i")
        """KV blocks in the order of positions, none while it waits; another object after each admission."""
        self.names = BlockNames(request.version, self.tokens, block_size)
        self.named = 0
        """Blocks of ``table``, from the first on, that others may share."""
        self.scored = 0
        """Positions, from the first on, of whose next prompt token a batch tells the log-probability."""
        self.score_end = 0 if request.sampling.prompt_logprobs is None else len(request.prompt) - 1
        """What ``scored`` has to become."""
        self.scores: list[TokenLogprobs] = []
        """Those that came, until they are told."""
        self.logprobs: list[TokenLogprobs] = []
        """Likewise of the output."""
        self.plain = request.sampling.plain
        """Whether nothing is wanted of a draw but the best token."""
        self.sequential = request.sampling.sequential
        """Whether its next draw depends on all tokens before it."""
        self.draw_state: Any = None
        """What the sampler remembers of the request, and of the tokens before, if it must."""
        self.order: tuple[float, int] | None = None
        """Its place among all requests, the least first: given when it is queued, and kept."""
        self.paid = 0
        """Tokens that its version was charged for, or that it got for nothing."""
        self._before = request.output_offset - len(request.prompt)
        self._complete = request.sampling.max_tokens - self._before
        self._stops = frozenset[int]() if request.sampling.ignore_eos else request.sampling.stop_token_ids

    def __len__(self) -> int:
        """Tokens so far: known ones, and those that are being drawn."""
        return self.length

    @property
    def pending(self) -> int:
        """Tokens that were given to no batch yet."""
        return self.length - self.scheduled

    @property
    def reusable(self) -> int:
        """Tokens, from the first on, that need not run if their keys and values are in the cache.

        The last one has to, for its logits, and so have those whose logits a request for prompt logprobs still needs.
        """
        return len(self) - 1 if self.scored >= self.score_end else self.scored

    @property
    def output_index(self) -> int:
        """Position, in the request's whole output, of the token after all of ``len(self)`` (see SamplingParams)."""
        return self._before + self.length

    @property
    def may_run(self) -> bool:
        """Whether the next tokens can be scheduled now.

        While a token is being drawn, not if it is the last one, or if the next draw depends on its value.
        """
        return not self.drawing or (not self.sequential and self.length < self._complete)

    def score(self, start: int, count: int) -> range:
        """Positions among the ``count`` from ``start`` on whose logits are needed; they count as scored from now on."""
        positions = range(max(start, self.scored), min(start + count, self.score_end))
        self.scored = max(self.scored, positions.stop)
        return positions

    def append(self, token: int) -> FinishReason | None:
        """Take the token that was drawn; a stop token is not kept. Returns the reason when the sequence is finished."""
        self.drawing -= 1
        if token in self._stops:
            return "stop"
        self.tokens.append(token)
        return "length" if len(self.tokens) == self._complete else None

    @property
    def silent(self) -> bool:
        """Whether the request was told nothing yet."""
        return self.told == len(self.request.prompt)

    def tell(self, reason: FinishReason | None = None, stop_token: int | None = None) -> TokenChunk:
        """What came since the last call."""
        tokens, self.told = tuple(self.tokens[self.told :]), len(self.tokens)
        if reason is None and not self.logprobs and not self.scores:
            return TokenChunk(tokens)
        chunk = TokenChunk(tokens, reason, None, tuple(self.logprobs), tuple(self.scores), stop_token)
        self.logprobs, self.scores = [], []
        return chunk
