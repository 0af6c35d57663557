"""Published files that are broken or hostile: one clear error of ours, and nobody else waits for them."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from deltazip_deployments.text.own_thread import OwnThread
from deltazip_deployments.text.version_text import VersionText, load_version_text
from deltazip_ray.errors import InvalidRequest, ManifestInvalid, PromptTooLong, RequestTimeout
from tests.support.tiny import make_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(good: dict[str, bytes], **files: str) -> VersionText:
    return load_version_text(good | {name.replace("__", "."): text.encode() for name, text in files.items()})


def tokenizer_with(good: dict[str, bytes], change: Callable[[dict[str, Any]], None]) -> str:
    document = json.loads(good["tokenizer.json"])
    change(document)
    return json.dumps(document)


def _unknown_model(document: dict[str, Any]) -> None:
    document["model"]["type"] = "Nope"


def _huge_ids(document: dict[str, Any]) -> None:
    document["model"]["vocab"] = dict.fromkeys(document["model"]["vocab"], 10**12)


def _split_at(regex: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }

    return change


@pytest.mark.parametrize("change", [_unknown_model, _huge_ids, _split_at("((((")])
def test_a_broken_tokenizer_is_a_broken_version(
    good: dict[str, bytes], change: Callable[[dict[str, Any]], None]
) -> None:
    with pytest.raises(ManifestInvalid, match="tokenizer files cannot be read"):
        load(good, tokenizer__json=tokenizer_with(good, change))


def test_a_panic_inside_the_tokenizer_is_a_broken_version(good: dict[str, bytes]) -> None:
    text = load(good, tokenizer__json=tokenizer_with(good, _split_at("(a+)+$")))
    with pytest.raises(ManifestInvalid, match="tokenizer fails"):
        text.encode("a" * 40 + "b", room=100)


@pytest.mark.parametrize("file", ["tokenizer__json", "generation_config__json", "special_tokens_map__json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "{", "\x00"])
def test_files_that_are_no_json_are_a_broken_version(good: dict[str, bytes], file: str, content: str) -> None:
    with pytest.raises(ManifestInvalid):
        load(good, **{file: content})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "NaN"),
        ("temperature", "1e400"),
        ("temperature", "1" + "0" * 400),
        ("temperature", "-1"),
        ("top_p", "7"),
        ("top_k", "1e400"),
        ("top_k", "-1"),
    ],
)
def test_impossible_defaults_are_the_versions_fault(good: dict[str, bytes], field: str, value: str) -> None:
    with pytest.raises(ManifestInvalid, match=field):
        load(good, generation_config__json=f'{{"{field}": {value}}}')


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}",
        "{{ 'a' * 10**18 }}",
        "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.__class__.__mro__ }}",
        "{% for %}",
    ],
)
def test_a_template_may_fail_as_it_likes(good: dict[str, bytes], template: str) -> None:
    text = load(good, chat_template__jinja=template)
    with pytest.raises(InvalidRequest, match="chat template"):
        text.encode_chat(HELLO, room=100)


def test_a_template_that_writes_half_a_character_is_a_broken_version(good: dict[str, bytes]) -> None:
    text = load(good, chat_template__jinja="{{ '\\ud800' }}")
    with pytest.raises(ManifestInvalid, match="tokenizer fails"):
        text.encode_chat(HELLO, room=100)


def test_a_text_that_cannot_fit_is_not_encoded(good: dict[str, bytes]) -> None:
    text = load(good)
    assert len(text.encode("a" * 3200, room=100)) == 3200, "it may fit, for all that its length tells"
    for encode in (
        lambda: text.encode("a" * 3201, room=100),
        lambda: text.encode_chat([{"role": "user", "content": "a" * 3201}], room=100),
    ):
        with pytest.raises(PromptTooLong, match="3201 characters"):
            encode()


async def test_others_go_on_while_a_long_text_is_encoded(good: dict[str, bytes]) -> None:
    text, words = load(good), "some words " * 20_000
    encoding = asyncio.create_task(OwnThread().run(lambda: text.encode(words, room=len(words))))
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 10, "the tokenizer kept the interpreter"


async def test_work_that_hangs_is_given_up_and_refused_at_once_until_it_ends() -> None:
    thread, go_on = OwnThread(timeout_s=0.2), threading.Event()
    with pytest.raises(RequestTimeout):
        await thread.run(go_on.wait)
    async with asyncio.timeout(0.1):
        with pytest.raises(RequestTimeout):
            await thread.run(lambda: 1)
    go_on.set()
    async with asyncio.timeout(5):
        while True:
            try:
                assert await thread.run(lambda: 2) == 2
                break
            except RequestTimeout:
                await asyncio.sleep(0.01)


async def test_an_endless_template_is_interrupted(good: dict[str, bytes]) -> None:
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}x"
    text, thread, ended = load(good, chat_template__jinja=loop), OwnThread(timeout_s=0.2), threading.Event()

    def work() -> None:
        try:
            text.encode_chat(HELLO, 100)
        finally:
            ended.set()

    with pytest.raises(RequestTimeout):
        await thread.run(work)
    assert await asyncio.to_thread(ended.wait, 5), "the loop would take minutes"
    await asyncio.sleep(0.1)
    assert await thread.run(lambda: 3) == 3


async def test_work_that_hangs_is_interrupted_though_its_client_has_left() -> None:
    thread, ended = OwnThread(timeout_s=0.2), threading.Event()

    def work() -> None:
        try:
            while True:
                time.sleep(0.001)
        finally:
            ended.set()

    client = asyncio.create_task(thread.run(work))
    await asyncio.sleep(0.05)
    client.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client
    assert await asyncio.to_thread(ended.wait, 5)
    assert await thread.run(lambda: 3) == 3


async def test_a_client_that_leaves_takes_its_waiting_work_with_it() -> None:
    thread, go_on, done = OwnThread(), threading.Event(), list[int]()
    first = asyncio.create_task(thread.run(go_on.wait))
    waiting = asyncio.create_task(thread.run(lambda: done.append(1)))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go_on.set()
    assert await first
    await thread.run(lambda: done.append(2))
    assert done == [2]
