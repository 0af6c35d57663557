"""The OpenAI API over ASGI, with a scripted engine: what does not need Ray."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect

from deltazip_ray.config import AppConfig, EngineConfig, RouterConfig, StoreConfig
from deltazip_ray.errors import BlobCorrupt, LoadTimeout, Overloaded
from tests.support.catalogs import publish, save_base_files
from tests.support.fake_engine import Script, scripted_tokens
from tests.support.router_app import RouterApp, router_app
from tests.support.tiny import make_tokenizer
from tests.support.waiting import until

TOKENIZER = make_tokenizer()
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}={% endif %}"


def text_of(version: str | None, prompt: str, count: int) -> str:
    ids = TOKENIZER.backend_tokenizer.encode(prompt).ids
    return TOKENIZER.backend_tokenizer.decode(scripted_tokens(version, tuple(ids), count))


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture
def config(tmp_path: Path) -> AppConfig:
    (tmp_path / "store").mkdir()
    return AppConfig(
        base=str(save_base_files(tmp_path / "base")),
        base_name="tiny",
        store=StoreConfig(url=(tmp_path / "store").as_uri()),
        engine=EngineConfig(max_model_len=256),
        router=RouterConfig(catalog_refresh_s=60, request_timeout_s=5),
    )


@pytest.fixture
def versions(tmp_path: Path, config: AppConfig) -> dict[str, str]:
    return {
        "one": publish(config.store, tmp_path, "one", seed=1),
        "two": publish(config.store, tmp_path, "two", seed=2, template=TEMPLATE, aliases=("latest", "prod")),
    }


@pytest.fixture
async def app(config: AppConfig, versions: dict[str, str]) -> AsyncIterator[RouterApp]:
    async with router_app(config, Script(), Path(config.base)) as running:
        yield running


async def test_completion_of_base_and_variants(app: RouterApp, versions: dict[str, str]) -> None:
    for model, version in [("tiny", None), ("one", versions["one"]), ("two@prod", versions["two"])]:
        response = await app.client.post(
            "/v1/completions", json={"model": model, "prompt": "abc", "max_tokens": 12, "ignore_eos": True}
        )
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["object"] == "text_completion"
        assert body["model"] == model
        assert body["choices"] == [
            {"index": 0, "logprobs": None, "finish_reason": "length", "text": text_of(version, "abc", 12)}
        ]
        assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
        assert response.headers["x-deltazip-version"] == (version or "base")
        assert response.headers["x-deltazip-tier"] == ("device" if version is None else "remote")
    warm = await app.client.post("/v1/completions", json={"model": "one", "prompt": "abc"})
    assert warm.headers["x-deltazip-tier"] == "device"
    assert warm.json()["usage"]["completion_tokens"] == 16


async def test_version_prefix_and_token_prompt(app: RouterApp, versions: dict[str, str]) -> None:
    ids = TOKENIZER.backend_tokenizer.encode("abc").ids
    model = f"one@{versions['one'][:12]}"
    response = await app.client.post("/v1/completions", json={"model": model, "prompt": ids, "max_tokens": 5})
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == text_of(versions["one"], "abc", 5)


async def test_streamed_completion_is_the_same_text(app: RouterApp) -> None:
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 9, "stream": True}
    plain = events(await app.client.post("/v1/completions", json=asked))
    assert "".join(e["choices"][0]["text"] for e in plain) == text_of(None, "abc", 9)
    assert [e["choices"][0]["finish_reason"] for e in plain] == [None] * (len(plain) - 1) + ["length"]
    assert not any("usage" in e for e in plain)
    counted = events(
        await app.client.post("/v1/completions", json={**asked, "stream_options": {"include_usage": True}})
    )
    assert [e["usage"] for e in counted[:-1]] == [None] * (len(counted) - 1)
    assert counted[-1]["choices"] == []
    assert counted[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}


async def test_chat_uses_the_variants_own_template(app: RouterApp, versions: dict[str, str]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for model, version, prompt in [("tiny", None, "<user>hi\n<assistant>"), ("two", versions["two"], "[hi]=")]:
        asked = {"model": model, "messages": messages, "max_completion_tokens": 6}
        body = (await app.client.post("/v1/chat/completions", json=asked)).json()
        expected = text_of(version, prompt, 6)
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"] == {"role": "assistant", "content": expected, "refusal": None}
        streamed = events(await app.client.post("/v1/chat/completions", json={**asked, "stream": True}))
        assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed) == expected
        assert streamed[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}


async def test_chat_without_a_limit_fills_the_context(app: RouterApp) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    usage = (await app.client.post("/v1/chat/completions", json=asked)).json()["usage"]
    assert usage["total_tokens"] == 256


async def test_stop_strings_end_the_text_and_the_work(app: RouterApp) -> None:
    whole = text_of(None, "abc", 60)
    stop = whole[20:22]
    expected = whole[: whole.index(stop)]
    for stream in (False, True):
        asked = {"model": "tiny", "prompt": "abc", "max_tokens": 60, "stop": ["#none", stop], "stream": stream}
        response = await app.client.post("/v1/completions", json=asked)
        if stream:
            found = events(response)
            assert "".join(e["choices"][0]["text"] for e in found) == expected
            assert found[-1]["choices"][0]["finish_reason"] == "stop"
        else:
            assert response.json()["choices"][0] | {"logprobs": None} == {
                "index": 0,
                "logprobs": None,
                "finish_reason": "stop",
                "text": expected,
            }
            assert response.json()["usage"]["completion_tokens"] == len(expected) + len(stop)
    assert app.backend.engine.stats().running == 0


async def test_sampling_reaches_the_engine(app: RouterApp) -> None:
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 11}
    await app.client.post("/v1/completions", json=asked)
    sampling = app.backend.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 11)
    assert sampling.stop_token_ids == {TOKENIZER.eos_token_id}
    await app.client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "ignore_eos": True})
    assert app.backend.requests[-1].sampling.stop_token_ids == frozenset()


async def test_priorities_are_for_those_who_offer_them(app: RouterApp, config: AppConfig) -> None:
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 2, "priority": -3}
    refused = await app.client.post("/v1/completions", json=asked)
    assert refused.status_code == 400
    assert "router.priorities" in refused.json()["error"]["message"]
    trusting = config.model_copy(update={"router": RouterConfig(priorities=True)})
    async with router_app(trusting, Script(), Path(config.base)) as other:
        assert (await other.client.post("/v1/completions", json=asked)).status_code == 200
        # The lower, the earlier, as in vLLM; the scheduler counts the other way.
        assert other.backend.requests[-1].priority == 3


async def test_a_variants_weight_goes_with_its_requests(app: RouterApp, config: AppConfig) -> None:
    weighing = config.model_copy(update={"router": RouterConfig(weights={"two": 2.5})})
    async with router_app(weighing, Script(), Path(config.base)) as other:
        for model, weight in (("two", 2.5), ("two@prod", 2.5), ("one", 1.0), ("tiny", 1.0)):
            await other.client.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 2})
            assert other.backend.requests[-1].weight == weight


async def test_models_lists_base_variants_and_aliases(app: RouterApp, versions: dict[str, str]) -> None:
    listed = (await app.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert {e["id"]: e["version"] for e in listed["data"]} == {
        "tiny": None,
        "one": versions["one"],
        "two": versions["two"],
        "two@prod": versions["two"],
    }
    now = time.time()
    assert all(now - 600 < entry["created"] <= now for entry in listed["data"])
    one = (await app.client.get("/v1/models/two@prod")).json()
    assert (one["id"], one["version"], one["parent"]) == ("two@prod", versions["two"], "tiny")
    assert (await app.client.get("/v1/models/none")).status_code == 404


async def test_unknown_variants_are_answered_with_those_that_exist(
    app: RouterApp, config: AppConfig, tmp_path: Path
) -> None:
    await asyncio.sleep(1.1)
    response = await app.client.post("/v1/completions", json={"model": "three", "prompt": "a"})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")
    assert "one, tiny, two" in error["message"]
    missing_alias = await app.client.post("/v1/completions", json={"model": "one@nope", "prompt": "a"})
    assert missing_alias.status_code == 404
    assert "latest" in missing_alias.json()["error"]["message"]
    # What is new since is found a moment later, without waiting for the next regular refresh.
    publish(config.store, tmp_path, "three", seed=3)
    await asyncio.sleep(1.1)
    assert (await app.client.post("/v1/completions", json={"model": "three", "prompt": "a"})).status_code == 200


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "https://example.com/x", "..", "", "a\x00b", "x" * 65, "a@../b", "@", "a@"]
)
async def test_hostile_names_are_refused(app: RouterApp, name: str) -> None:
    response = await app.client.post("/v1/completions", json={"model": name, "prompt": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{not json", None),
        (b'{"model": "tiny"}', "prompt"),
        (b'{"model": "tiny", "prompt": "a", "n": 33}', "n"),
        (b'{"model": "tiny", "prompt": ["a", "b"]}', "prompt"),
        (b'{"model": "tiny", "prompt": ""}', None),
        (b'{"model": "tiny", "prompt": [99999]}', None),
    ],
)
async def test_bad_requests_say_what_is_wrong(app: RouterApp, body: bytes, param: str | None) -> None:
    response = await app.client.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_body_without_end_is_not_read_to_its_end(app: RouterApp) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 1000:
            sent += 1
            yield b" " * (1 << 20)

    response = await app.client.post("/v1/completions", content=body())
    assert response.status_code == 400
    assert "4194304 bytes" in response.json()["error"]["message"]
    assert sent < 70


async def test_prompts_beyond_the_context_are_refused(app: RouterApp) -> None:
    for asked in ({"prompt": "a" * 257}, {"prompt": "a" * 250, "max_tokens": 7}):
        response = await app.client.post("/v1/completions", json={"model": "tiny", **asked})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    fits = await app.client.post("/v1/completions", json={"model": "tiny", "prompt": "a" * 250, "max_tokens": 6})
    assert fits.status_code == 200


async def test_more_messages_than_fit_do_not_keep_the_template_busy(app: RouterApp) -> None:
    asked = {"model": "two", "messages": [{"role": "user", "content": ""}] * 257}
    refused = await app.client.post("/v1/chat/completions", json=asked)
    assert refused.json()["error"]["code"] == "context_length_exceeded"


async def test_unknown_paths_and_methods_have_openai_bodies(app: RouterApp) -> None:
    for method, path, status in [
        ("GET", "/nope", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/completions/", 404),
    ]:
        response = await app.client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("error", [Overloaded("full"), LoadTimeout("slow"), BlobCorrupt("broken")])
async def test_errors_before_the_first_token_have_their_status_in_streams_too(app: RouterApp, error: Any) -> None:
    app.backend.refuse = error
    statuses = {Overloaded: 429, LoadTimeout: 503, BlobCorrupt: 500}
    for stream in (False, True):
        asked = {"model": "tiny", "prompt": "a", "stream": stream}
        response = await app.client.post("/v1/completions", json=asked)
        assert response.status_code == statuses[type(error)]
        assert response.json()["error"]["message"] == error.message
        assert ("retry-after" in response.headers) == (response.status_code in (429, 503))


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(app: RouterApp) -> None:
    app.backend.fail_after = [2, 0, 0]
    asked = {"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 8}
    response = await app.client.post("/v1/completions", json=asked)
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "no_replica"
    assert "[DONE]" not in response.text


async def test_a_lost_replica_is_replaced_in_the_middle(app: RouterApp) -> None:
    app.backend.fail_after = [3, 4]
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "seed": 5}
    body = (await app.client.post("/v1/completions", json=asked)).json()
    assert body["choices"][0]["text"] == text_of(None, "abc", 20)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
    assert [request.output_offset for request in app.backend.requests] == [0, 3, 7]
    assert {request.sampling.seed for request in app.backend.requests} == {5}


async def test_a_replica_lost_after_its_last_token_is_not_asked_again(app: RouterApp) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 3}
    app.backend.lose_the_end = True
    answer = (await app.client.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["text"] == text_of(None, "abc", 3)
    assert len(app.backend.requests) == 1


async def test_a_slow_answer_times_out(config: AppConfig) -> None:
    hasty = config.model_copy(update={"router": RouterConfig(request_timeout_s=0.2)})
    async with router_app(hasty, Script(step_s=0.05), Path(config.base)) as app:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 100}
        response = await app.client.post("/v1/completions", json=asked)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "request_timeout"
        assert app.backend.engine.stats().running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_the_flood_of_one_variant_leaves_places_for_others(
    config: AppConfig, versions: dict[str, str], stream: bool
) -> None:
    router = config.router.model_copy(update={"max_ongoing_requests": 8})
    config = config.model_copy(update={"router": router})
    async with router_app(config, Script(step_s=0.02), Path(config.base)) as app:

        async def ask(model: str) -> int:
            asked = {"model": model, "prompt": "a", "max_tokens": 20, "ignore_eos": True, "stream": stream}
            return (await app.client.post("/v1/completions", json=asked)).status_code

        async def flood() -> None:
            asked = [asyncio.create_task(ask("one@latest")) for _ in range(20)]
            await until(lambda: sum(task.done() for task in asked) == 14)
            assert {task.result() for task in asked if task.done()} == {429}
            assert [await ask("two"), await ask("tiny")] == [200, 200]
            assert sorted(await asyncio.gather(*asked)) == [200] * 6 + [429] * 14

        await flood()
        await flood()  # what was given back can be taken again


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"n": 3, "stream": True}, {"stream": True}])
async def test_a_client_that_leaves_cancels_the_work(config: AppConfig, fields: dict[str, Any]) -> None:
    async with router_app(config, Script(step_s=0.05), Path(config.base)) as app:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 200, "ignore_eos": True, **fields}
        call = asyncio.create_task(app.client.post("/v1/completions", json=asked))
        await until(lambda: app.backend.engine.stats().running == fields.get("n", 1))
        call.cancel()
        await asyncio.wait({call})
        assert app.backend.engine.stats().running == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_is_found_gone_while_an_event_is_written(config: AppConfig, n: int) -> None:
    async with router_app(config, Script(step_s=0.02), Path(config.base)) as app:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": n}
        request = httpx.Request("POST", "http://router/v1/completions", json=asked)
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST", "path": request.url.path}
        scope |= {"headers": request.headers.raw, "query_string": b""}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": request.content}

        events = 0

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal events
            events += 1
            if events == 10:
                await asyncio.sleep(0.01)
                raise OSError("the client is gone")

        with pytest.raises(ClientDisconnect):
            await app.api(scope, receive, send)
        assert app.backend.engine.stats().running == 0


async def test_one_output_that_fails_ends_them_all(config: AppConfig) -> None:
    async with router_app(config, Script(step_s=0.02), Path(config.base)) as app:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 100, "ignore_eos": True, "n": 3, "stream": True}
        app.backend.fail_after = [None, 5, None, 0, 0]
        response = await app.client.post("/v1/completions", json=asked)
        last = response.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "no_replica"
        assert app.backend.engine.stats().running == 0
        app.backend.fail_after = [None, 0, None, 0, 0]
        refused = await app.client.post("/v1/completions", json=asked)
        assert refused.status_code == 503
        assert app.backend.engine.stats().running == 0


async def test_metrics_has_everything_under_labels(app: RouterApp) -> None:
    await app.client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 4})
    await app.client.post("/v1/completions", content=b"{")
    response = await app.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'deltazip_router_requests_total{endpoint="/v1/completions",status="200"} 1.0' in response.text
    assert 'deltazip_router_requests_total{endpoint="/v1/completions",status="400"} 1.0' in response.text
    assert 'deltazip_router_tokens_total{kind="completion"} 4.0' in response.text
    assert "deltazip_router_open_requests 0.0" in response.text
    assert 'x{node="n1",replica="r1"} 1.0' in response.text
    assert 'y{node="n1"} 2.0' in response.text


async def test_requests_before_any_replica_are_told_to_come_back(config: AppConfig) -> None:
    async with router_app(config, Script(), Path(config.base), replicas=False) as app:
        health = await app.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        for model in ("tiny", "one"):
            response = await app.client.post("/v1/completions", json={"model": model, "prompt": "a"})
            assert response.status_code == 503
            assert response.headers["retry-after"]


async def test_what_became_of_streams_is_counted(app: RouterApp) -> None:
    asked = {"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 8}
    await app.client.post("/v1/completions", json=asked)
    app.backend.fail_after = [2, 0, 0]
    await app.client.post("/v1/completions", json=asked)
    text = (await app.client.get("/metrics")).text
    assert 'deltazip_router_requests_total{endpoint="/v1/completions",status="200"} 1.0' in text
    assert 'deltazip_router_requests_total{endpoint="/v1/completions",status="503"} 1.0' in text
    assert "deltazip_router_open_requests 0.0" in text


async def test_a_bug_is_not_counted_as_a_client_that_left(app: RouterApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.backend, "generate", None)
    response = await app.client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    text = (await app.client.get("/metrics")).text
    assert 'deltazip_router_requests_total{endpoint="/v1/completions",status="500"} 1.0' in text
