"""Log-probabilities in the forms of the two endpoints."""

from collections.abc import Callable, Sequence
from typing import Any

from deltazip_ray.scheduler.request import TokenLogprobs

Told = Sequence[tuple[int, TokenLogprobs | None]]
"""Tokens with their log-probabilities; the first one of a prompt has none."""
TokenText = Callable[[int], str]


def chat_logprobs(told: Told, text_of: TokenText, offset: int) -> dict[str, Any]:
    """``logprobs`` of a chat completion, which does not use ``offset``."""
    return {"content": [_entry(token, one, text_of) for token, one in told if one is not None], "refusal": None}


def completion_logprobs(told: Told, text_of: TokenText, offset: int) -> dict[str, Any]:
    """``logprobs`` of a text completion; ``offset`` is the position of the first token's text."""
    texts = [text_of(token) for token, _ in told]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if one is None else one.chosen for _, one in told],
        "top_logprobs": [None if one is None else _best(token, one, text_of) for token, one in told],
        "text_offset": offsets,
    }


def prompt_logprobs(told: Told, text_of: TokenText) -> list[dict[str, Any] | None]:
    """``prompt_logprobs`` in vLLM's form: for each token of the prompt, that token and the likeliest ones, by id."""
    return [None if one is None else _ranked(token, one, text_of) for token, one in told]


def _ranked(token: int, one: TokenLogprobs, text_of: TokenText) -> dict[str, Any]:
    ranked = {token: (one.chosen, one.rank)} | {
        other: (value, rank) for rank, (other, value) in enumerate(one.best, start=1)
    }
    return {
        str(other): {"logprob": value, "rank": rank, "decoded_token": text_of(other)}
        for other, (value, rank) in ranked.items()
    }


def _entry(token: int, one: TokenLogprobs, text_of: TokenText) -> dict[str, Any]:
    best = [_token(other, value, text_of) for other, value in one.best]
    return {**_token(token, one.chosen, text_of), "top_logprobs": best}


def _token(token: int, value: float, text_of: TokenText) -> dict[str, Any]:
    text = text_of(token)
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _best(token: int, one: TokenLogprobs, text_of: TokenText) -> dict[str, float]:
    """The likeliest tokens and the sampled one, by text; of two with the same text the likelier one."""
    best = {text_of(token): one.chosen}
    for other, value in reversed(one.best):
        best[text_of(other)] = value
    return best
