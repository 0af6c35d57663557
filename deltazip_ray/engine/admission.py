"""What a request must be before it costs anything."""

import math

from deltazip_ray.errors import InvalidRequest
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

_MAX_TOP_K = (1 << 31) - 1
_SEEDS = range(-(1 << 63), 1 << 64)


def check_sampling(params: SamplingParams) -> None:
    """Raise InvalidRequest for parameters that are not finite or out of range."""
    rules = {
        "max_tokens must be at least 1": params.max_tokens >= 1,
        "temperature must be a number from 0": math.isfinite(params.temperature) and params.temperature >= 0,
        "top_p must be a number above 0 and at most 1": 0 < params.top_p <= 1,
        "min_p must be a number from 0 to 1": 0 <= params.min_p <= 1,
        f"top_k must be 0 (all tokens) to {_MAX_TOP_K}": 0 <= params.top_k <= _MAX_TOP_K,
        "seed must fit into 64 bits": params.seed in _SEEDS,
    }
    for rule, holds in rules.items():
        if not holds:
            raise InvalidRequest(rule)


def check_tokens(request: GenerateRequest, vocab_size: int) -> None:
    """Raise InvalidRequest when the prompt has tokens that are not in ``0 .. vocab_size - 1``."""
    if not request.prompt:
        return  # The scheduler's own check says so.
    for token in (min(request.prompt), max(request.prompt)):
        if not 0 <= token < vocab_size:
            who = "the base" if request.version is None else f"version {request.version[:12]}"
            raise InvalidRequest(
                f"token {token} is not in the vocabulary of {who} (0 to {vocab_size - 1}): use its own tokenizer"
            )
