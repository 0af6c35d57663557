"""Checks requests before they cost anything."""

import math
from collections.abc import Iterable

from deltazip_ray.errors import InvalidRequest
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

MOST_TOP_K = (1 << 31) - 1
MOST_LOGPROBS = 20
MOST_BIASES = 1024
MOST_STRUCTURE_CHARS = 64 << 10
_SEEDS = range(-(1 << 63), 1 << 64)
_TOKENS = range(1 << 31)


def check_sampling(params: SamplingParams) -> None:
    """Raise InvalidRequest for parameters that are not finite, out of range or contradict each other."""
    structured = params.structure is not None
    rules = {
        "max_tokens must be at least 1": params.max_tokens >= 1,
        "min_tokens must be a number from 0 to max_tokens": 0 <= params.min_tokens <= params.max_tokens,
        "temperature must be a number from 0": math.isfinite(params.temperature) and params.temperature >= 0,
        "top_p must be a number above 0 and at most 1": 0 < params.top_p <= 1,
        "min_p must be a number from 0 to 1": 0 <= params.min_p <= 1,
        f"top_k must be 0 (all tokens) to {MOST_TOP_K}": 0 <= params.top_k <= MOST_TOP_K,
        "seed must fit into 64 bits": params.seed in _SEEDS,
        "stop_token_ids must be numbers from 0 that fit into 31 bits": all(
            token in _TOKENS for token in params.stop_token_ids
        ),
        "repetition_penalty must be a number from 0.01 to 10": 0.01 <= params.repetition_penalty <= 10,
        "frequency_penalty must be a number from -2 to 2": -2 <= params.frequency_penalty <= 2,
        "presence_penalty must be a number from -2 to 2": -2 <= params.presence_penalty <= 2,
        f"logprobs must be 0 to {MOST_LOGPROBS}": params.logprobs is None or 0 <= params.logprobs <= MOST_LOGPROBS,
        f"prompt_logprobs must be 0 to {MOST_LOGPROBS}": (
            params.prompt_logprobs is None or 0 <= params.prompt_logprobs <= MOST_LOGPROBS
        ),
        f"logit_bias takes up to {MOST_BIASES} tokens": len(params.logit_bias) <= MOST_BIASES,
        "logit_bias must be numbers from -100 to 100": all(-100 <= bias <= 100 for _, bias in params.logit_bias),
        "a structured output ends where its structure does: leave out min_tokens and ignore_eos": (
            not structured or not (params.min_tokens or params.ignore_eos)
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise InvalidRequest(rule)


def check_tokens(request: GenerateRequest, vocab_size: int, *, at_most: bool = False) -> None:
    """Raise InvalidRequest when the prompt or logit_bias has tokens that are not in ``0 .. vocab_size - 1``.

    ``at_most``: the version's own vocabulary may be smaller.
    """
    who = "the base" if request.version is None else f"version {request.version[:12]}"
    allowed = f"is not in the vocabulary of {who} (0 to {vocab_size - 1}{' at the most' if at_most else ''})"
    # An empty prompt is rejected by the scheduler's check.
    _check_range(request.prompt, vocab_size, f"{allowed}: use its own tokenizer")
    _check_range([token for token, _ in request.sampling.logit_bias], vocab_size, f"of logit_bias {allowed}")


def _check_range(tokens: Iterable[int], vocab_size: int, message: str) -> None:
    for token in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"token {token} {message}")
