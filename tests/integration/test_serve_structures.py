"""Structured output from the ``openai`` client: whatever the random model says, it matches."""

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio

from deltazip_deployments.openai.protocol import ChatRequest, CompletionRequest
from deltazip_ray.artifact.file_store import FileStore
from tests.support.real_router import RealApp, real_router
from tests.support.tiny import ALPHABET, make_base, make_finetune
from tests.support.versions import build_version
from tests.support.zoo import Zoo

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODELS = ["base", "variant-0", "variant-1"]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RealApp]:
    """A base that can write JSON, a fine-tune, and one with tokens of its own."""
    path = tmp_path_factory.mktemp("json")
    base = make_base(path / "base", alphabet=ALPHABET + '"_\\')
    tunes = [make_finetune(base, path / "a", seed=1), make_finetune(base, path / "b", seed=2, added=("<one>", '": "'))]
    store = FileStore(path / "store")
    versions = tuple(build_version(base, tune, "int4") for tune in tunes)
    for i, version in enumerate(versions):
        version.publish(store, f"variant-{i}", path / f"artifact{i}")
    async with real_router(Zoo(base, store, versions, {})) as running:
        yield running


def random_schema(chance: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose instances are short."""
    kinds = ["integer", "boolean", "string", "enum", "pattern", *(["object", "array", "anyOf"] if depth else [])]
    match chance.choice(kinds):
        case "integer":
            low = chance.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 99)}
        case "boolean":
            return {"type": "boolean"}
        case "string":
            return {"type": "string", "maxLength": chance.randint(0, 4)}
        case "enum":
            return {"enum": chance.sample(["a", "b c", 7, None, True, "x:y", -2.5], chance.randint(1, 4))}
        case "pattern":
            return {"type": "string", "pattern": chance.choice(["^[a-f]{2}$", "^(on|off)$", "^[0-9]{1,3}-x$"])}
        case "array":
            most = chance.randint(1, 3)
            return {"type": "array", "items": random_schema(chance, depth - 1), "maxItems": most}
        case "anyOf":
            return {"anyOf": [random_schema(chance, depth - 1) for _ in range(2)]}
        case _:
            names = chance.sample("abcdefgh", chance.randint(1, 4))
            properties = {name: random_schema(chance, depth - 1) for name in names}
            required = chance.sample(names, chance.randint(0, len(names)))
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


async def say(app: RealApp, seed: int, model: str, stream: bool = False, **fields: Any) -> str:
    """A complete answer of a model that would say anything."""
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"go {seed}"}],
        "seed": seed,
        "temperature": 1.5,
        "max_tokens": 230,
    }
    if stream:
        events = [event async for event in await app.openai.chat.completions.create(**asked, stream=True, **fields)]
        assert events[-1].choices[0].finish_reason == "stop"
        return "".join(event.choices[0].delta.content or "" for event in events)
    choice = (await app.openai.chat.completions.create(**asked, **fields)).choices[0]
    assert choice.finish_reason == "stop", choice.message.content
    return choice.message.content


async def test_random_schemas_are_always_obeyed(app: RealApp) -> None:
    chance = random.Random(7)
    schemas = [{"type": "array", "items": random_schema(chance), "maxItems": 2} for _ in range(24)]

    async def check(seed: int, schema: dict[str, Any]) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
        text = await say(app, seed, MODELS[seed % 3], stream=seed % 2 == 0, response_format=form)
        jsonschema.validate(json.loads(text), schema)

    await asyncio.gather(*(check(seed, schema) for seed, schema in enumerate(schemas)))


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"regex": r"(yes|no), [a-c]{3}\.?"}, r"(yes|no), [a-c]{3}\.?"),
        ({"choice": ["red", "green {or} blue"]}, r"red|green \{or\} blue"),
        ({"json": '{"type": "integer", "minimum": 100, "maximum": 120}'}, r"1[01]\d|120"),
    ],
)
async def test_vllms_spelling(app: RealApp, structure: dict[str, Any], pattern: str) -> None:
    for seed, model in enumerate(MODELS):
        text = await say(app, seed, model, extra_body={"structured_outputs": structure})
        assert re.fullmatch(pattern, text), text


async def test_n_outputs_of_a_completion_are_structured_each_on_its_own(app: RealApp) -> None:
    answer = await app.openai.completions.create(
        model="variant-0",
        prompt="abc",
        n=4,
        max_tokens=40,
        temperature=2,
        seed=3,
        logprobs=1,
        extra_body={"structured_outputs": {"regex": "[a-z]{8}"}, "repetition_penalty": 1.2},
    )
    texts = [choice.text for choice in answer.choices]
    assert all(re.fullmatch("[a-z]{8}", text) for text in texts), texts
    assert len(set(texts)) == 4


async def test_a_structure_goes_on_in_another_replica(app: RealApp) -> None:
    fields = {"extra_body": {"structured_outputs": {"regex": "(ab|cd|[x-z]){12}"}, "frequency_penalty": 1.5}}
    unbroken = await say(app, 8, "variant-0", **fields)
    app.router.backend.fail_after = [3, 2]
    assert await say(app, 8, "variant-0", **fields) == unbroken
    assert [request.output_offset for request in app.router.backend.requests[-3:]] != [0, 0, 0]
    assert re.fullmatch("(ab|cd|[x-z]){12}", unbroken)


async def test_tokens_that_a_version_added_count_and_special_ones_do_not(app: RealApp) -> None:
    for choice in ("<one>", "<one>a", "<bos>"):
        text = await say(app, 1, "variant-1", extra_body={"structured_outputs": {"choice": [choice]}})
        assert text == choice


async def test_structured_outputs_share_batches_with_free_ones(app: RealApp) -> None:
    async def free(seed: int) -> str:
        answer = await app.openai.completions.create(
            model=MODELS[seed % 3], prompt="abc", max_tokens=30, seed=seed, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    alone = [await free(seed) for seed in range(4)]
    structured = {"structured_outputs": {"regex": "[a-d]{20}"}}
    together = await asyncio.gather(
        *(free(seed) for seed in range(4)),
        *(say(app, seed, MODELS[seed % 3], extra_body=structured) for seed in range(6)),
    )
    assert together[:4] == alone
    assert all(re.fullmatch("[a-d]{20}", text) for text in together[4:])


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"regex": "(a"}, "parenthesis"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"grammar": 'root ::= "a"'}, "router.ebnf"),
        ({"regex": "ж+"}, "no text"),
        ({"regex": "a{40}ж"}, "no token of this model continues"),
    ],
)
async def test_structures_that_cannot_be_used_are_the_clients_error(
    app: RealApp, structure: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        await say(app, 0, "base", extra_body={"structured_outputs": structure})


def examples() -> list[tuple[str, dict[str, Any]]]:
    """Path and body of each curl command of docs/api.md."""
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    found = re.findall(r"curl -sN? localhost:8000(/\S+) -H '[^']*' -d '(.*?)'\n", text, re.DOTALL)
    return [(path, json.loads(body)) for path, body in found]


@pytest.mark.parametrize(("path", "body"), examples())
async def test_commands_of_the_manual(app: RealApp, path: str, body: dict[str, Any]) -> None:
    response = await app.router.client.post(path, json=body | {"model": "variant-0"}, timeout=30)
    assert response.status_code == 200, response.text


async def test_every_field_is_in_the_manual() -> None:
    assert len(examples()) == 3
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    fields = {**CompletionRequest.model_fields, **ChatRequest.model_fields}
    assert [name for name in fields if f"`{name}`" not in text] == []
