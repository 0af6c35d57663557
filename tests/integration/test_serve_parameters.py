"""Sampling parameters from the ``openai`` client to a real engine and back, with transformers as the oracle."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
import torch
from openai.types import Completion

from tests.support.engines import random_prompt
from tests.support.real_router import RealApp, real_router
from tests.support.tiny import make_tokenizer
from tests.support.zoo import Zoo

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = random_prompt(3, 12)
TOKENS = 14


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(zoo: Zoo) -> AsyncIterator[RealApp]:
    async with real_router(zoo) as running:
        yield running


async def complete(app: RealApp, model: str = "variant-0", **fields: Any) -> Completion:
    asked = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    extra = asked["extra_body"] | fields.pop("extra_body", {})
    return await app.openai.completions.create(model=model, **asked | fields | {"extra_body": extra})


def text_of(tokens: list[int]) -> str:
    return make_tokenizer().backend_tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("fields", "theirs"),
    [
        ({}, {}),
        ({"extra_body": {"repetition_penalty": 1.8}}, {"repetition_penalty": 1.8}),
        ({"logit_bias": {"40": 100, "7": -100}}, {"sequence_bias": {(40,): 100.0, (7,): -100.0}}),
        (
            {"logit_bias": {"40": 6}, "extra_body": {"repetition_penalty": 3.0}},
            {"sequence_bias": {(40,): 6.0}, "repetition_penalty": 3.0},
        ),
    ],
)
async def test_greedy_outputs_are_those_of_transformers(
    app: RealApp, zoo: Zoo, fields: dict[str, Any], theirs: dict[str, Any]
) -> None:
    model = zoo.oracles[zoo.versions[0].version].model
    ids = torch.tensor([PROMPT])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, **theirs
    )[0, len(PROMPT) :].tolist()
    assert (await complete(app, **fields)).choices[0].text == text_of(expected)


async def test_penalties_keep_tokens_from_coming_back(app: RealApp) -> None:
    biased = {"logit_bias": {"40": 12}}
    free = (await complete(app, **biased)).choices[0].text
    assert free.count(text_of([40])) > TOKENS // 2
    for name in ("presence_penalty", "frequency_penalty"):
        held = (await complete(app, **biased, **{name: 2})).choices[0].text
        assert held.count(text_of([40])) <= free.count(text_of([40]))
    strong = {"extra_body": {"repetition_penalty": 10}}
    assert (await complete(app, **biased, **strong)).choices[0].text.count(text_of([40])) < TOKENS // 2


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_completions_are_the_models(app: RealApp, zoo: Zoo, stream: bool) -> None:
    if stream:
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        text = ""
        async for event in await complete(app, logprobs=4, stream=True):
            text += event.choices[0].text
            for name, values in told.items():
                values.extend(getattr(event.choices[0].logprobs, name) if event.choices[0].logprobs else [])
    else:
        choice = (await complete(app, logprobs=4)).choices[0]
        told, text = choice.logprobs.model_dump(), choice.text
    assert "".join(told["tokens"]) == text
    assert told["text_offset"] == list(range(TOKENS))  # one character a token
    ids = make_tokenizer().convert_tokens_to_ids(told["tokens"])
    logprobs = zoo.oracles[zoo.versions[0].version].logits([*PROMPT, *ids])[len(PROMPT) - 1 : -1].log_softmax(-1)
    assert told["token_logprobs"] == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-3)
    for row, best in enumerate(told["top_logprobs"]):
        assert sorted(best.values(), reverse=True) == pytest.approx(logprobs[row].topk(4).values.tolist(), abs=1e-3)
        assert told["tokens"][row] in best


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echoed_prompt_has_its_logprobs(app: RealApp, zoo: Zoo, stream: bool) -> None:
    quiet = (await complete(app, logprobs=2, n=2)).choices[1].logprobs
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    asked: dict[str, Any] = {"logprobs": 2, "echo": True, "n": 2}
    if stream:
        async for event in await complete(app, **asked, stream=True):
            for name, values in told.items():
                if event.choices[0].index == 1 and event.choices[0].logprobs:
                    values.extend(getattr(event.choices[0].logprobs, name))
    else:
        told = (await complete(app, **asked)).choices[1].logprobs.model_dump()
    length = len(PROMPT)
    assert make_tokenizer().convert_tokens_to_ids(told["tokens"][:length]) == PROMPT
    assert told["text_offset"] == list(range(length + TOKENS))
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    logprobs = zoo.oracles[zoo.versions[0].version].logits(PROMPT)[:-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    assert told["token_logprobs"][1:length] == pytest.approx(expected.tolist(), abs=1e-3)
    for row, best in enumerate(told["top_logprobs"][1:length]):
        assert told["tokens"][row + 1] in best
        assert sorted(best.values())[-2:] == pytest.approx(logprobs[row].topk(2).values.flip(0).tolist(), abs=1e-3)
    assert told["tokens"][length:] == quiet.tokens
    assert told["token_logprobs"][length:] == pytest.approx(quiet.token_logprobs, abs=1e-4)


async def test_prompt_logprobs_as_vllm_tells_them(app: RealApp, zoo: Zoo) -> None:
    extra = {"prompt_logprobs": 1}
    whole = await complete(app, extra_body=extra, logprobs=4, echo=True, max_tokens=0)
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason, whole.usage.completion_tokens) == (text_of(PROMPT), "length", 0)
    assert len(choice.logprobs.tokens) == len(PROMPT)
    first, *told = choice.model_extra["prompt_logprobs"]
    assert first is None
    logprobs = zoo.oracles[zoo.versions[0].version].logits(PROMPT)[:-1].log_softmax(-1)
    for row, (token, best) in enumerate(zip(PROMPT[1:], told, strict=True)):
        likeliest = int(logprobs[row].argmax())
        assert best.keys() == {str(token), str(likeliest)}
        assert best[str(likeliest)]["rank"] == 1
        assert best[str(token)]["rank"] == 1 + int((logprobs[row] > logprobs[row, token]).sum())
        assert best[str(token)]["logprob"] == pytest.approx(float(logprobs[row, token]), abs=1e-3)
        assert best[str(token)]["decoded_token"] == text_of([token])
    chat = await app.openai.chat.completions.create(
        model="variant-0", messages=[{"role": "user", "content": "hi"}], max_tokens=2, extra_body={"prompt_logprobs": 0}
    )
    assert len(chat.model_extra["prompt_logprobs"]) == chat.usage.prompt_tokens
    assert "prompt_logprobs" not in chat.choices[0].model_extra


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_chats(app: RealApp, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "base",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 6,
        "seed": 4,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"ignore_eos": True},
    }
    if stream:
        events = [event async for event in await app.openai.chat.completions.create(**asked, stream=True)]
        text = "".join(event.choices[0].delta.content or "" for event in events)
        told = [entry for event in events if event.choices[0].logprobs for entry in event.choices[0].logprobs.content]
    else:
        choice = (await app.openai.chat.completions.create(**asked)).choices[0]
        text, told = choice.message.content, choice.logprobs.content
    assert len(told) == 6
    assert bytes(byte for entry in told for byte in entry.bytes).decode() == "".join(entry.token for entry in told)
    assert "".join(entry.token for entry in told if not entry.token.startswith("<")) == text
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= entry.top_logprobs[0].logprob for entry in told)


@pytest.mark.parametrize("stream", [False, True])
async def test_n_outputs_are_those_of_n_requests_and_differ(app: RealApp, stream: bool) -> None:
    asked: dict[str, Any] = {"n": 4, "temperature": 1.2, "seed": 21}
    whole = await complete(app, **asked)
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert whole.usage.completion_tokens == 4 * TOKENS
    assert whole.usage.prompt_tokens == len(PROMPT)
    if stream:
        streamed = dict.fromkeys(range(4), "")
        reasons = {}
        async for event in await complete(app, **asked, stream=True):
            choice = event.choices[0]
            streamed[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
        assert list(streamed.values()) == texts
        assert set(reasons.values()) == {"length"}
    else:
        assert (await complete(app, **asked | {"n": 1})).choices[0].text == texts[0]


async def test_best_of_gives_the_likeliest(app: RealApp) -> None:
    asked: dict[str, Any] = {"temperature": 1.5, "seed": 5, "logprobs": 0}
    every = (await complete(app, n=5, **asked)).choices
    ranked = sorted(every, key=lambda choice: sum(choice.logprobs.token_logprobs), reverse=True)
    best = (await complete(app, n=2, best_of=5, **asked)).choices
    assert [choice.text for choice in best] == [choice.text for choice in ranked[:2]]
    quiet = (await complete(app, best_of=5, temperature=1.5, seed=5)).choices
    assert [choice.text for choice in quiet] == [ranked[0].text]
    assert quiet[0].logprobs is None


async def test_stop_ids_end_and_min_tokens_keep_from_ending(app: RealApp) -> None:
    free = (await complete(app)).choices[0].text
    stop = make_tokenizer().convert_tokens_to_ids(free[5])
    first = free.index(free[5])
    stopped = (await complete(app, extra_body={"stop_token_ids": [stop]}, logprobs=0)).choices[0]
    assert (stopped.text, stopped.finish_reason) == (free[:first], "stop")
    assert "".join(stopped.logprobs.tokens) == free[: first + 1], "what ended it is told too, as vLLM does"
    later = (await complete(app, extra_body={"stop_token_ids": [stop], "min_tokens": first + 3})).choices[0]
    assert len(later.text) >= first + 3
    assert free[5] not in later.text[: first + 3]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_repeats_the_prompt(app: RealApp, stream: bool) -> None:
    plain = (await complete(app, prompt="abc ")).choices[0].text
    if stream:
        events = [event async for event in await complete(app, prompt="abc ", echo=True, stream=True)]
        assert "".join(event.choices[0].text for event in events) == "abc " + plain
    else:
        assert (await complete(app, prompt="abc ", echo=True)).choices[0].text == "abc " + plain
        assert (await complete(app, echo=True)).choices[0].text.startswith(text_of(PROMPT))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {"4000": 1}}, "vocabulary"),
        ({"presence_penalty": 3}, "presence_penalty.*2"),
        ({"n": 50}, "n: .*32"),
        ({"logprobs": 30}, "logprobs: .*20"),
        ({"extra_body": {"min_p": 2}}, "min_p: .*1"),
        ({"extra_body": {"prompt_logprobs": 21}}, "prompt_logprobs: .*20"),
        ({"extra_body": {"prompt_logprobs": 1}, "stream": True}, "prompt_logprobs.*stream"),
        ({"max_tokens": 0}, "max_tokens.*echo"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty: .*0"),
    ],
)
async def test_values_out_of_range_are_refused_with_the_range(
    app: RealApp, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        await complete(app, **fields)
