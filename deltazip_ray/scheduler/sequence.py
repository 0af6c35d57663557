"""What the scheduler knows about one request."""

from deltazip_ray.scheduler.request import FinishReason, GenerateRequest


class SequenceState:
    """A request on its way: its tokens so far and how many of them are in the KV cache.

    Prefill, decode and recompute after a preemption are one thing here: ``pending`` tokens have to run, and the step
    that runs the last of them samples the next one.
    """

    __slots__ = ("_prompt_len", "computed", "request", "slot", "tokens")

    def __init__(self, request: GenerateRequest, slot: int) -> None:
        """``slot``: where the version's delta is on the device; -1 for the base."""
        self.request = request
        self.slot = slot
        self.tokens = list(request.prompt)
        self.computed = 0
        self._prompt_len = len(request.prompt)

    def __len__(self) -> int:
        """Tokens known so far: prompt and output."""
        return len(self.tokens)

    @property
    def pending(self) -> int:
        """Known tokens that are not in the KV cache; at least 1 until the sequence finishes."""
        return len(self.tokens) - self.computed

    @property
    def output_index(self) -> int:
        """Position, in the request's whole output, of the token that is sampled next (see SamplingParams)."""
        return self.request.output_offset + len(self.tokens) - self._prompt_len

    def append(self, token: int) -> FinishReason | None:
        """Take the sampled token; a stop token is not kept. Returns the reason when the sequence is finished."""
        sampling = self.request.sampling
        if token in sampling.stop_token_ids and not sampling.ignore_eos:
            return "stop"
        self.tokens.append(token)
        return "length" if self.output_index >= sampling.max_tokens else None
