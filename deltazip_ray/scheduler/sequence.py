"""What the scheduler knows about one request."""

from typing import Any

from deltazip_ray.scheduler.request import FinishReason, GenerateRequest


class SequenceState:
    """A request on its way: its tokens so far and how many of them were given to a batch.

    Prefill, decode and recompute after a preemption are one thing here: ``pending`` tokens have to run, and the step
    that runs the last of them samples the next one. While that step is on its way the token counts, but its value is
    not known (``drawing``).
    """

    __slots__ = (
        "_prompt_len",
        "draw_state",
        "drawing",
        "in_flight",
        "over",
        "request",
        "row",
        "scheduled",
        "slot",
        "table",
        "tokens",
    )

    def __init__(self, request: GenerateRequest, slot: int) -> None:
        """``slot``: where the version's delta is on the device; -1 for the base."""
        self.request = request
        self.slot = slot
        self.tokens = list(request.prompt)
        """Known tokens: prompt and output."""
        self.scheduled = 0
        """Tokens, from the first on, that ran or are in a batch on its way."""
        self.drawing = False
        """Whether a batch on its way draws the token after ``tokens``."""
        self.row = 0
        """Which of that batch's sampling chunks does."""
        self.in_flight = 0
        """Batches on their way that have tokens of this sequence."""
        self.over = False
        """Finished, failed or aborted: what batches on their way bring is dropped."""
        self.table: list[int] = []
        """KV blocks in the order of positions; a new object each time the sequence is admitted."""
        self.draw_state: Any = None
        """What the sampler remembers of the tokens before, if it must."""
        self._prompt_len = len(request.prompt)

    def __len__(self) -> int:
        """Tokens so far: known ones, and the one that is being drawn."""
        return len(self.tokens) + self.drawing

    @property
    def pending(self) -> int:
        """Tokens that were given to no batch yet."""
        return len(self.tokens) + self.drawing - self.scheduled

    @property
    def output_index(self) -> int:
        """Position, in the request's whole output, of the token after all of ``len(self)`` (see SamplingParams)."""
        return self.request.output_offset + len(self) - self._prompt_len

    @property
    def may_run(self) -> bool:
        """Whether the next tokens can be scheduled now.

        While a token is being drawn, not if it is the last one, or if the next draw depends on its value.
        """
        if not self.drawing:
            return True
        sampling = self.request.sampling
        return self.output_index < sampling.max_tokens and not sampling.sequential

    def append(self, token: int) -> FinishReason | None:
        """Take the token that was drawn; a stop token is not kept. Returns the reason when the sequence is finished."""
        sampling = self.request.sampling
        self.drawing = False
        if token in sampling.stop_token_ids and not sampling.ignore_eos:
            return "stop"
        self.tokens.append(token)
        return "length" if self.output_index >= sampling.max_tokens else None
