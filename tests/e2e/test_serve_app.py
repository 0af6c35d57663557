"""The application on Ray Serve with scripted engines: routing, cancellation, recovery, one scrape."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import ray
from ray import serve

from deltazip_deployments.app import application
from deltazip_deployments.node_store.discovery import NAMESPACE, find_or_start, list_stores
from deltazip_deployments.serving import APP_NAME
from deltazip_ray.config import AppConfig, EngineConfig, NodeStoreConfig, RouterConfig, StoreConfig
from tests.support.catalogs import BASE_DIGEST, publish, save_base_files
from tests.support.fake_engine import FATAL_SEED, Script, scripted_tokens
from tests.support.serve_app import ServeApp, private_ray, scratch, serve_app, wait_until
from tests.support.tiny import make_tokenizer

SCRIPT = Script(step_s=0.02)
VARIANTS = tuple(f"v{i}" for i in range(8))
TOKENIZER = make_tokenizer().backend_tokenizer


@pytest.fixture(scope="module")
def versions() -> dict[str | None, str]:
    return {}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, versions: dict[str | None, str]) -> AppConfig:
    folder = tmp_path_factory.mktemp("serve")
    store = StoreConfig(url=scratch(folder, "store").as_uri())
    versions |= {name: publish(store, folder, name, seed=i, size=5000) for i, name in enumerate(VARIANTS)}
    return AppConfig(
        base=str(save_base_files(folder / "base")),
        base_name="tiny",
        store=store,
        replicas=2,
        replica_resources={"CPU": 0.5},
        engine=EngineConfig(max_model_len=512, slots=3, max_running=16),
        node_store=NodeStoreConfig(arena_bytes=4 << 20, lease_timeout_s=2),
        router=RouterConfig(catalog_refresh_s=1),
    )


@pytest.fixture(scope="module")
def app(config: AppConfig) -> Iterator[ServeApp]:
    with private_ray(), serve_app(config, SCRIPT) as running:
        # Of an application that has no replicas: it must be gone by itself at the end.
        find_or_start("nobody", config, BASE_DIGEST)
        yield running


def text_of(version: str | None, prompt: str, count: int) -> str:
    return TOKENIZER.decode(scripted_tokens(version, tuple(TOKENIZER.encode(prompt).ids), count))


def log_lines(files: str) -> list[str]:
    """The lines of all of Ray's logs of such names."""
    paths = Path(os.environ["RAY_TMPDIR"]).glob(f"ray/session_latest/logs/{files}")
    return [line for path in paths for line in path.read_text().splitlines()]


async def test_the_openai_client_streaming_and_not(app: ServeApp, versions: dict[str | None, str]) -> None:
    async with openai.AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client:
        assert {model.id async for model in client.models.list()} == {"tiny", *VARIANTS}
        whole = await client.completions.create(model="v0", prompt="abc", max_tokens=6)
        assert whole.choices[0].text == text_of(versions["v0"], "abc", 6)
        assert whole.usage is not None
        assert whole.usage.total_tokens == 9
        stream = await client.chat.completions.create(
            model="v0",
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=7,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == text_of(versions["v0"], "<user>hi\n<assistant>", 7)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 7
        with pytest.raises(openai.NotFoundError, match="v0, v1"):
            await client.completions.create(model="v99", prompt="a")
        with pytest.raises(openai.BadRequestError, match="'suffix' is not supported"):
            await client.completions.create(model="v0", prompt="a", suffix="b")


async def test_many_at_once_and_all_right(app: ServeApp, versions: dict[str | None, str]) -> None:
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:

        async def ask(model: str, prompt: str) -> tuple[str, str]:
            answer = await client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": 12})
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == text_of(versions.get(model), prompt, 12)
            return model, answer.headers["x-deltazip-tier"]

        asked = [(model, f"prompt {i}") for i in range(6) for model in ("tiny", *VARIANTS)]
        answers = await asyncio.gather(*(ask(*one) for one in asked))
        tiers = Counter(tier for model, tier in answers if model == "tiny")
        assert tiers == {"device": 6}
        # There are fewer slots than versions; but who was just here is warm, and is sent where it is.
        for model in VARIANTS:
            await ask(model, "once")
            assert await ask(model, "again") == (model, "device")


def test_versions_spread_over_replicas_and_one_scrape_sees_all(app: ServeApp) -> None:
    wait_until(lambda: sum(app.by_replica("fake_engine_tokens_total").values()) > 500)
    made = app.by_replica("fake_engine_tokens_total")
    assert len(made) == 2
    assert min(made.values()) > 0
    assert sum(app.samples("deltazip_router_tokens_total").values()) > 500
    nodes = {dict(labels)["node"] for labels in app.samples("deltazip_host_bytes")}
    assert len(nodes) == 1
    # Each version came to the host once, whichever replicas loaded it.
    assert sum(app.samples("deltazip_host_fetched_bytes_total").values()) < len(VARIANTS) * 45_000


def test_bad_requests_through_the_proxy(app: ServeApp) -> None:
    malformed = httpx.post(f"{app.url}/v1/completions", content=b"{nope", headers={"x-request-id": "mine"})
    assert malformed.status_code == 400
    assert malformed.json()["error"]["type"] == "invalid_request_error"
    assert malformed.headers.get_list("x-request-id") == ["mine"]
    in_latin = httpx.get(f"{app.url}/v1/models", headers=[(b"x-request-id", b"caf\xe9")])
    assert (in_latin.status_code, in_latin.headers["x-request-id"]) == (200, "café")
    for name in ("../x", "a/b", "http://x"):
        assert httpx.post(f"{app.url}/v1/completions", json={"model": name, "prompt": "a"}).status_code == 400
    for path in ("/v1/models/..%2Fx", "/v1/models/a/b"):
        assert httpx.get(app.url + path).status_code in (400, 404)
    too_long = httpx.post(f"{app.url}/v1/completions", json={"model": "tiny", "prompt": "a" * 600})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_work_in_the_engine(app: ServeApp, stream: bool) -> None:
    wait_until(lambda: sum(app.by_replica("fake_engine_running").values()) == 0)
    asked = {"model": "v1", "prompt": "abc", "max_tokens": 500, "stream": stream}
    with httpx.Client(base_url=app.url, timeout=httpx.Timeout(10, read=1.5)) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=asked) as response:
                lines = response.iter_lines()
                next(lines)
                wait_until(lambda: sum(app.by_replica("fake_engine_running").values()) == 1)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=asked)
    # Ten seconds of work are left: it must end long before.
    wait_until(lambda: sum(app.by_replica("fake_engine_running").values()) == 0, timeout_s=5)


def test_a_client_that_sends_too_much_hears_so(app: ServeApp) -> None:
    refused = httpx.post(f"{app.url}/v1/completions", json={"model": "v1", "prompt": "a" * (16 << 20)})
    assert refused.status_code == 400
    assert "4194304 bytes" in refused.json()["error"]["message"]


def test_answers_may_be_long(app: ServeApp) -> None:
    asked = {"model": "v1", "prompt": "a" * 400, "max_tokens": 1, "n": 16, "prompt_logprobs": 20}
    answer = httpx.post(f"{app.url}/v1/completions", json=asked, timeout=30)
    assert answer.status_code == 200
    assert len(answer.content) > 4 << 20, "more than gRPC takes by default"


def test_a_stop_string_ends_the_work_in_the_engine(app: ServeApp, versions: dict[str | None, str]) -> None:
    wait_until(lambda: sum(app.by_replica("fake_engine_running").values()) == 0)
    stop = text_of(versions["v1"], "abc", 12)[9:]
    before = sum(app.by_replica("fake_engine_tokens_total").values())
    asked = {"model": "v1", "prompt": "abc", "max_tokens": 500, "stop": stop}
    answer = httpx.post(f"{app.url}/v1/completions", json=asked, timeout=30).json()
    assert answer["choices"][0]["text"] == text_of(versions["v1"], "abc", 9)
    wait_until(lambda: sum(app.by_replica("fake_engine_tokens_total").values()) > before, timeout_s=5)
    wait_until(lambda: sum(app.by_replica("fake_engine_running").values()) == 0, timeout_s=5)


def test_a_killed_node_store_is_replaced(app: ServeApp) -> None:
    (name,) = list_stores("deltazip")
    ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    # There are fewer slots than versions, so loads go on; and the new store begins empty.
    for model in VARIANTS:
        answer = httpx.post(f"{app.url}/v1/completions", json={"model": model, "prompt": "a"}, timeout=30)
        assert answer.status_code == 200, answer.text
    assert list_stores("deltazip") == [name]
    loads = {dict(labels)["tier"]: n for labels, n in app.samples("deltazip_host_acquires_total").items()}
    assert loads["remote"] >= 2
    wait_until(lambda: len(app.by_replica("fake_engine_tokens_total")) == 2)


async def test_a_stream_survives_its_replica(app: ServeApp, versions: dict[str | None, str]) -> None:
    wait_until(lambda: sum(app.by_replica("fake_engine_running").values()) == 0)
    asked = {"model": "v2", "prompt": "abc", "max_tokens": 200, "stream": True}
    text, events = "", 0
    async with (
        httpx.AsyncClient(base_url=app.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=asked, headers={"x-request-id": "moves-on"}) as response,
    ):
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            events += 1
            if events == 5:
                busy = await asyncio.to_thread(_busy_replica, app)
                await asyncio.to_thread(app.kill_replica, busy)
    assert text == text_of(versions["v2"], "abc", 200)
    assert response.status_code == 200
    assert any("moves-on" in line and "lost its replica" in line for line in log_lines("serve/replica_*_router_*.log"))


def _busy_replica(app: ServeApp) -> str:
    busy: list[str] = []

    def is_one() -> bool:
        busy[:] = [replica for replica, running in app.by_replica("fake_engine_running").items() if running]
        return len(busy) == 1

    wait_until(is_one, timeout_s=3)
    return busy[0]


def test_all_is_well_afterwards(app: ServeApp) -> None:
    wait_until(lambda: httpx.get(f"{app.url}/health").json() == {"status": "ok", "problems": []})
    for model in ("tiny", *VARIANTS):
        answer = httpx.post(f"{app.url}/v1/completions", json={"model": model, "prompt": "a"}, timeout=30)
        assert answer.status_code == 200
    # The dead replica's silence ends its lease; its successor reports instead.
    wait_until(lambda: len(app.by_replica("fake_engine_running")) == 2)


async def test_nothing_is_sent_to_a_replica_whose_engine_has_ended(app: ServeApp) -> None:
    """Serve replaces it after three checks; until then it would be the fastest of all to answer, with an error."""
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
        fatal = await client.post("/v1/completions", json={"model": "v3", "prompt": "a", "seed": FATAL_SEED})
        assert fatal.status_code == 200, fatal.text
        for _ in range(10):
            asked = [{"model": model, "prompt": "a", "max_tokens": 2} for model in ("tiny", *VARIANTS)]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=one) for one in asked))
            assert [answer.status_code for answer in answers] == [200] * len(asked), answers[0].text


def test_a_node_store_that_nobody_needs_ends_by_itself(app: ServeApp) -> None:
    wait_until(lambda: list_stores("nobody") == [])
    assert len(list_stores("deltazip")) == 1
    assert any("INFO" in line and "no replica needs this" in line for line in log_lines("worker-*.err"))


def routers(app: ServeApp) -> set[str]:
    return {dict(labels)["router"] for labels in app.samples("deltazip_router_open_requests")}


async def test_an_update_lets_answers_finish(app: ServeApp, config: AppConfig, versions: dict[str | None, str]) -> None:
    """The old router finishes its answer, over new replicas, while a new router answers others."""
    wait_until(lambda: sum(app.by_replica("fake_engine_running").values()) == 0)
    asked = {"model": "v2", "prompt": "abc", "max_tokens": 480}
    updated = config.model_copy(update={"router": RouterConfig(catalog_refresh_s=2)})
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
        under_way = asyncio.create_task(client.post("/v1/completions", json=asked))
        await asyncio.to_thread(_busy_replica, app)
        before = routers(app)
        target = serve.RunTarget(application(updated, SCRIPT), name=APP_NAME)
        await asyncio.to_thread(serve.run_many, [target], wait_for_applications_running=False)
        while not under_way.done():
            (await client.post("/v1/completions", json=asked | {"max_tokens": 2})).raise_for_status()
        assert under_way.result().json()["choices"][0]["text"] == text_of(versions["v2"], "abc", 480)
    wait_until(lambda: not routers(app) & before)


def test_no_file_is_left_in_shared_memory() -> None:
    assert not list(Path("/dev/shm").glob("deltazip-*"))
