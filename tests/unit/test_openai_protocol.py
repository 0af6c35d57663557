"""What requests may say: everything else is refused by name."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from deltazip_deployments.openai.body import InvalidField, parse_request, read_request
from deltazip_deployments.openai.protocol import ChatRequest, CompletionRequest
from deltazip_ray.errors import InvalidRequest
from deltazip_ray.scheduler.request import SamplingParams, Structure

COMPLETION: dict[str, Any] = {"model": "m", "prompt": "abc"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps(CHAT | fields).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps(COMPLETION | fields).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("suffix", "end"),
        ("reasoning_effort", "high"),
        ("no_such_field", 1),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(field: str, value: Any) -> None:
    for request in (chat, completion):
        with pytest.raises(InvalidField, match=field) as refused:
            request(**{field: value})
        assert refused.value.param == field


def test_fields_of_the_other_endpoint_are_refused() -> None:
    for field, value in (("best_of", 3), ("echo", True)):
        with pytest.raises(InvalidField, match=field):
            chat(**{field: value})
    with pytest.raises(InvalidField, match="top_logprobs"):
        completion(top_logprobs=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "u"),
        ("metadata", {"a": "b"}),
        ("store", False),
        ("service_tier", "auto"),
        ("n", 1),
        ("logprobs", None),
        ("presence_penalty", 0.0),
        ("frequency_penalty", 0),
        ("tools", []),
        ("tool_choice", "auto"),
        ("response_format", {"type": "text"}),
        ("logit_bias", {}),
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(field: str, value: Any) -> None:
    assert chat(**{field: value}).model == completion(**{field: value}).model == "m"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n"),
        ({"priority": 17}, "priority"),
        ({"n": 33}, "n"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 1e-9}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"lark": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "min_tokens"),
        ({"stop": 7}, "stop"),
        ({"model": 7}, "model"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options"),
        ({"stream_options": {"surprise": True}, "stream": True}, "stream_options"),
    ],
)
def test_bad_values_name_their_field(fields: dict[str, Any], param: str) -> None:
    for request in (chat, completion):
        with pytest.raises(InvalidField, match=param) as refused:
            request(**fields)
        assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ],
)
def test_a_place_is_told_as_the_client_wrote_it(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidField, match=f"^{where}: "):
        chat(**fields)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'"text"'])
def test_bodies_that_are_no_json_object_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="JSON"):
        parse_request(ChatRequest, body)


@pytest.mark.parametrize(
    "fields",
    [
        '"prompt": [' + "-1," * 1_000_000 + "0]",
        '"prompt": "a", "stop": [' + "0," * 1_000_000 + "0]",
        '"prompt": "a", "stop_token_ids": [' + "-1," * 1_000_000 + "0]",
        '"prompt": "a", "structured_outputs": {' + ",".join(f'"{i}": 0' for i in range(300_000)) + "}",
        '"prompt": "a", "logit_bias": {' + ",".join(f'"{i}": ""' for i in range(300_000)) + "}",
    ],
    ids=lambda fields: fields[:30],
)
def test_a_million_mistakes_are_told_as_fast_as_one(fields: str) -> None:
    """The event loop waits meanwhile: 1.3 to 4.9 s with a list of all mistakes."""
    began = time.perf_counter()
    with pytest.raises(InvalidField):
        parse_request(CompletionRequest, f'{{"model": "m", {fields}}}'.encode())
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("depth", range(300, 1010, 10))
def test_no_depth_is_too_much_for_the_router(depth: int) -> None:
    schema = '{"items": ' * depth + "{}" + "}" * depth
    form = f'{{"type": "json_schema", "json_schema": {{"name": "s", "schema": {schema}}}}}'
    try:
        asked = parse_request(CompletionRequest, f'{{"model": "m", "prompt": "a", "response_format": {form}}}'.encode())
    except InvalidRequest:
        return
    assert asked.structure is not None
    assert json.loads(asked.structure.text)


def test_a_long_structure_is_refused_before_it_travels() -> None:
    with pytest.raises(InvalidField, match="65536"):
        completion(structured_outputs={"choice": ["x" * 1000] * 70})


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"model": "m",'
        await asyncio.Event().wait()

    with pytest.raises(InvalidRequest, match="not complete"):
        await read_request(CompletionRequest, body(), timeout_s=0.05)


@pytest.mark.parametrize(
    ("count", "content", "most"),
    [(8193, "", "at most 8192"), (1, [{"type": "text", "text": ""}] * 1025, "at most 1024")],
)
def test_there_is_an_end_to_messages_and_their_parts(count: int, content: Any, most: str) -> None:
    with pytest.raises(InvalidField, match=most):
        chat(messages=[{"role": "user", "content": content}] * count)


def test_not_a_number_is_refused() -> None:
    with pytest.raises(InvalidField, match="temperature"):
        parse_request(CompletionRequest, b'{"model": "m", "prompt": "a", "temperature": NaN}')


def test_missing_fields_are_named() -> None:
    with pytest.raises(InvalidField, match="prompt") as refused:
        parse_request(CompletionRequest, b'{"model": "m"}')
    assert refused.value.param == "prompt"
    with pytest.raises(InvalidField, match="messages"):
        parse_request(ChatRequest, b'{"model": "m", "messages": []}')


def test_one_prompt_in_any_form() -> None:
    assert completion(prompt="ab").prompt == "ab"
    assert completion(prompt=["ab"]).prompt == "ab"
    assert completion(prompt=[5, 6]).prompt == [5, 6]
    assert completion(prompt=[[5, 6]]).prompt == [5, 6]
    assert completion(prompt=[]).prompt == []


def test_a_token_that_cannot_be_one_is_named() -> None:
    for token, message in ((-1, "greater than or equal to 0"), (1 << 31, "less than 2147483648")):
        with pytest.raises(InvalidField, match=rf"^prompt\.1: .*{message}"):
            completion(prompt=[5, token])


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [-1], [1.5], {"a": 1}, [1, "a"]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidField, match="prompt"):
        completion(prompt=prompt)


def test_messages_are_flattened_to_text() -> None:
    request = chat(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
        ]
    )
    assert [message.plain() for message in request.messages] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab", "name": "n"},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"content": "x"},
        "x",
    ],
)
def test_messages_beyond_text_are_refused(message: Any) -> None:
    with pytest.raises(InvalidField, match="messages"):
        chat(messages=[message])


def test_output_limits() -> None:
    assert completion().output_limit == 16
    assert completion(max_tokens=None).output_limit is None
    assert chat().output_limit is None
    assert chat(max_tokens=5).output_limit == 5
    assert chat(max_tokens=5, max_completion_tokens=7).output_limit == 7


def test_sampling_prefers_the_request_over_the_version_over_neutral() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    ends = frozenset({2})
    own = completion(temperature=0, seed=3).sampling(max_tokens=4, end_token_ids=ends, defaults=defaults)
    assert (own.temperature, own.top_p, own.top_k, own.seed, own.max_tokens) == (0.0, 0.9, 20, 3, 4)
    neutral = completion(top_k=-1).sampling(max_tokens=4, end_token_ids=ends, defaults={})
    assert (neutral.temperature, neutral.top_p, neutral.top_k, neutral.ignore_eos) == (1.0, 1.0, 0, False)


def sampled(request: ChatRequest | CompletionRequest) -> SamplingParams:
    return request.sampling(max_tokens=64, end_token_ids=frozenset({2}), defaults={})


def test_extra_parameters_reach_the_engine() -> None:
    fields = {"min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.1}
    for request in (chat, completion):
        params = sampled(request(**fields, min_tokens=3, stop_token_ids=[7, 8], logit_bias={"5": -100, "6": 2.5}))
        assert {name: getattr(params, name) for name in fields} == fields
        assert params.min_tokens == 3
        assert params.stop_token_ids == {2, 7, 8}
        assert params.logit_bias == ((5, -100), (6, 2.5))
        assert params.sequential
    assert sampled(chat(ignore_eos=True, stop_token_ids=[7])).stop_token_ids == {7}


def test_logprobs_of_both_endpoints() -> None:
    assert [sampled(completion(logprobs=count)).logprobs for count in (None, 0, 5)] == [None, 0, 5]
    assert sampled(chat()).logprobs is None
    assert sampled(chat(logprobs=True)).logprobs == 0
    assert sampled(chat(logprobs=True, top_logprobs=4)).logprobs == 4
    assert sampled(completion(best_of=3)).logprobs == 0
    for request, fields in (
        (chat, {"top_logprobs": 3}),
        (chat, {"logprobs": True, "top_logprobs": 21}),
        (completion, {"logprobs": 21}),
    ):
        with pytest.raises(InvalidField, match="logprobs"):
            request(**fields)


def test_choices_and_candidates() -> None:
    assert (completion().choices, completion().candidates) == (1, 1)
    assert (completion(n=2, best_of=5).choices, completion(n=2, best_of=5).candidates) == (2, 5)
    assert (chat(n=3).choices, chat(n=3).candidates) == (3, 3)
    for fields in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"best_of": 33}):
        with pytest.raises(InvalidField, match="best_of"):
            completion(**fields)


@pytest.mark.parametrize(
    ("fields", "structure"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Structure("json")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}},
            Structure("json_schema", '{"type": "null"}'),
        ),
        ({"structured_outputs": {"json": {"type": "null"}}}, Structure("json_schema", '{"type": "null"}')),
        ({"structured_outputs": {"json": '{"type":"null"}'}}, Structure("json_schema", '{"type":"null"}')),
        ({"structured_outputs": {"json_object": True}}, Structure("json")),
        ({"structured_outputs": {"regex": "a+"}}, Structure("regex", "a+")),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Structure("grammar", 'root ::= "a"')),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Structure("choice", '["a", "b"]')),
    ],
)
def test_structures_in_both_spellings(fields: dict[str, Any], structure: Structure | None) -> None:
    for request in (chat, completion):
        assert sampled(request(**fields)).structure == structure


def test_a_missing_seed_is_drawn_anew_and_a_negative_one_fits() -> None:
    seeds = {completion().sampling(max_tokens=1, end_token_ids=frozenset(), defaults={}).seed for _ in range(8)}
    assert len(seeds) == 8
    negative = completion(seed=-1).sampling(max_tokens=1, end_token_ids=frozenset(), defaults={}).seed
    assert 0 <= negative < 1 << 63


def test_stops_are_few_and_not_empty() -> None:
    assert completion(stop="x").stops == ("x",)
    assert completion(stop=["x", "y"]).stops == ("x", "y")
    for stop in ("", ["x", ""], ["x"] * 17):
        with pytest.raises(InvalidField, match="stop"):
            completion(stop=stop)
    with pytest.raises(InvalidField, match="stream"):
        completion(stream_options={"include_usage": True})


@pytest.mark.parametrize(
    "body",
    [
        rb'{"model": "m", "prompt": "\ud800"}',
        rb'{"model": "m", "prompt": "x", "\uDC00": 1}',
        rb'{"model": "m", "prompt": "x", "user": ["\ud83d \ude00"]}',
        b'{"model": "m", "prompt": "\xed\xa0\x80"}',
    ],
)
def test_halves_of_characters_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="UTF-8"):
        parse_request(CompletionRequest, body)


def test_whole_characters_may_be_escaped() -> None:
    assert parse_request(CompletionRequest, rb'{"model": "m", "prompt": "\ud83d\ude00"}').prompt == "\U0001f600"


@pytest.mark.parametrize("top_k", [10**30, 10**400])
def test_no_top_k_is_too_large_for_the_machine(top_k: int) -> None:
    request = CompletionRequest(model="m", prompt="x", top_k=top_k)
    assert request.sampling(max_tokens=1, end_token_ids=frozenset(), defaults={}).top_k == (1 << 31) - 1
