"""The limits of a single request."""

from dataclasses import dataclass

from deltazip_ray.errors import InvalidRequest, PromptTooLong
from deltazip_ray.scheduler.request import GenerateRequest

_MAX_PRIORITY = 16
_WEIGHTS = (0.1, 100.0)


@dataclass(frozen=True)
class Limits:
    """The limits of every request, independent of others. Thread-safe."""

    max_model_len: int
    cache_tokens: int
    """Tokens that the whole KV cache holds."""

    def check(self, request: GenerateRequest) -> None:
        """Reject requests that could never run.

        Raises InvalidRequest (empty prompt, nothing to generate, priority out of range) or PromptTooLong.
        """
        remaining = request.sampling.max_tokens - request.output_offset
        if not request.prompt:
            raise InvalidRequest("the prompt is empty: send at least one token")
        if not 0 <= request.output_offset < len(request.prompt) or remaining < 1:
            raise InvalidRequest(
                f"max_tokens is {request.sampling.max_tokens} with {request.output_offset} output tokens made: "
                "ask for at least one more, after a prompt of at least one"
            )
        if abs(request.priority) > _MAX_PRIORITY or not _WEIGHTS[0] <= request.weight <= _WEIGHTS[1]:
            raise InvalidRequest(
                f"priority {request.priority} and weight {request.weight}: use -{_MAX_PRIORITY} to {_MAX_PRIORITY} and "
                f"{_WEIGHTS[0]} to {_WEIGHTS[1]}"
            )
        total = len(request.prompt) + remaining
        if total > self.max_model_len:
            raise PromptTooLong(
                f"{len(request.prompt)} prompt tokens and up to {remaining} output tokens exceed the context of "
                f"{self.max_model_len}: shorten the prompt or lower max_tokens"
            )
        # The last output token is never fed back, so it needs no room in the cache.
        if total - 1 > self.cache_tokens:
            raise PromptTooLong(
                f"{total} tokens exceed the KV cache of {self.cache_tokens}: "
                "shorten the prompt, lower max_tokens or give the engine more kv_blocks"
            )
