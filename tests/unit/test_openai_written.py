"""JSON of long answers: the same as from one call of the encoder, and the event loop goes on meanwhile."""

import json
from typing import Any

import pytest

from deltazip_deployments.openai.written import written
from tests.support.waiting import longest_hold


@pytest.mark.parametrize(
    "document",
    [
        {},
        [],
        {"a": [], "b": {}, "c": None, "d": "\u00e9\n\x00"},
        {"choices": [{"text": "x", "logprobs": {"tokens": ["a"] * 100, "offsets": list(range(65))}}]},
        {"prompt_logprobs": [None, *({str(i): {"logprob": -0.5, "rank": i}} for i in range(100))]},
    ],
)
async def test_a_long_answer_is_written_like_a_short_one(document: Any) -> None:
    short = await written(lambda: document, long=False)
    assert await written(lambda: document, long=True) == short
    assert json.loads(short) == document


async def test_others_are_answered_while_a_long_answer_is_written() -> None:
    document = {"prompt_logprobs": [{str(i): {"logprob": -1.5, "rank": i} for i in range(20)}] * 8000}
    longest, took = await longest_hold(written(lambda: document, long=True))
    assert longest < took / 3
