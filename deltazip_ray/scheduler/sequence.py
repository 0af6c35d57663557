"""The scheduler's state of one request."""

from array import array
from typing import Any

from deltazip_ray.kvcache.block_names import BlockNames
from deltazip_ray.scheduler.request import FinishReason, GenerateRequest, TokenChunk, TokenLogprobs


class SequenceState:
    """An unfinished request: its tokens so far, and how many of them are in a batch.

    Prefill, decode and recompute after a preemption are the same here: ``pending`` tokens have to run, and the step
    that runs the last of them samples the next one. While that step runs, the new token counts, but its value is not
    known (``drawing``).
    """

    __slots__ = (
        "_complete",
        "_stops",
        "before",
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
        """``slot`` of the version's delta; -1 for the base."""
        self.request = request
        self.slot = slot
        self.tokens = list(request.prompt)
        """Known tokens: prompt and output."""
        self.told = self.length = len(self.tokens)
        """``told``: tokens of the prompt and those already delivered. ``length``: all tokens, including sampled ones
        whose value is not known yet."""
        self.scheduled = 0
        """Number of tokens at the start that are in the KV cache or in a batch in flight."""
        self.drawing = 0
        """Batches in flight that sample a token for it: at most one when a step is scheduled."""
        self.row = 0
        """The index of its chunk in that batch's ``sampling_chunks``."""
        self.in_flight = 0
        """Batches in flight that contain tokens of it."""
        self.over = False
        """Finished, failed or aborted: tokens from batches in flight are dropped."""
        self.table = array("i")
        """KV blocks by position, empty while it waits; a new object at each admission."""
        self.names = BlockNames(request.version, self.tokens, block_size)
        self.named = 0
        """Number of blocks at the start of ``table`` that others may share."""
        self.scored = 0
        """Number of positions at the start whose logits were or will be used for prompt logprobs."""
        self.score_end = 0 if request.sampling.prompt_logprobs is None else len(request.prompt) - 1
        """The value of ``scored`` when all prompt logprobs are computed."""
        self.scores: list[TokenLogprobs] = []
        """Prompt logprobs that were not delivered yet."""
        self.logprobs: list[TokenLogprobs] = []
        """Output logprobs that were not delivered yet."""
        self.plain = request.sampling.plain
        """See SamplingParams; cached, as it is needed in every step."""
        self.sequential = request.sampling.sequential
        """See SamplingParams; cached too."""
        self.draw_state: Any = None
        """The sampler's state of this request, if it needs any."""
        self.order: tuple[float, int] | None = None
        """Its place among all requests, lowest first; assigned when it is first queued."""
        self.paid = 0
        """Number of tokens at the start that its version was charged for or got for free."""
        self.before = request.output_offset - len(request.prompt)
        """What to add to a position for its position in the request's whole output."""
        self._complete = request.sampling.max_tokens - self.before
        self._stops = frozenset[int]() if request.sampling.ignore_eos else request.sampling.stop_token_ids

    def __len__(self) -> int:
        """Number of tokens so far, including one that is being sampled."""
        return self.length

    @property
    def pending(self) -> int:
        """Tokens that are not in a batch yet."""
        return self.length - self.scheduled

    @property
    def reusable(self) -> int:
        """Number of tokens at the start that need not run if their keys and values are in the cache.

        The last token has to run for its logits, and so do those whose logits are still needed for prompt logprobs.
        """
        return len(self) - 1 if self.scored >= self.score_end else self.scored

    @property
    def may_run(self) -> bool:
        """Whether the next tokens can be scheduled now.

        Not while a token is being sampled that is the last one, or that the next draw depends on.
        """
        return not self.drawing or (not self.sequential and self.length < self._complete)

    def score(self, start: int, stop: int) -> range:
        """The positions in ``[start, stop)`` whose logits are needed; marks them as scored."""
        positions = range(max(start, self.scored), min(stop, self.score_end))
        self.scored = max(self.scored, positions.stop)
        return positions

    def append(self, token: int) -> FinishReason | None:
        """Append a sampled token unless it is a stop token. Returns the finish reason if the sequence is finished."""
        self.drawing -= 1
        if token in self._stops:
            return "stop"
        self.tokens.append(token)
        return "length" if len(self.tokens) == self._complete else None

    @property
    def silent(self) -> bool:
        """Whether nothing was delivered yet."""
        return self.told == len(self.request.prompt)

    def tell(self, reason: FinishReason | None = None, stop_token: int | None = None) -> TokenChunk:
        """The tokens and logprobs since the last call."""
        tokens, self.told = tuple(self.tokens[self.told :]), len(self.tokens)
        if reason is None and not self.logprobs and not self.scores:
            return TokenChunk(tokens)
        chunk = TokenChunk(tokens, reason, None, tuple(self.logprobs), tuple(self.scores), stop_token)
        self.logprobs, self.scores = [], []
        return chunk
