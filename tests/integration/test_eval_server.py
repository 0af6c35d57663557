"""``deltazip eval`` asks a running server."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from prometheus_client import CollectorRegistry

from deltazip_deployments.router.api import build_api
from deltazip_deployments.router.metrics import RouterMetrics
from deltazip_deployments.router.service import RouterService
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import AppConfig, EngineConfig, StoreConfig
from tests.support.catalogs import save_base_files
from tests.support.command import deltazip, scores
from tests.support.engines import SETTINGS
from tests.support.fake_engine import Script
from tests.support.real_router import RealEngine
from tests.support.router_app import CatalogSource, EngineMaker, LocalBackend
from tests.support.tasks import CHOICE, GENERATED, write_task
from tests.support.tiny import make_tokenizer
from tests.support.zoo import Zoo

QUESTIONS = [f"what is {first} + {second}?" for first in range(4) for second in range(3)]


@contextmanager
def served(config: AppConfig, script: EngineMaker) -> Iterator[str]:
    """A router over an engine, on a socket: its URL."""
    catalog = Catalog(open_store(config.store), script.base_digest)
    backend = LocalBackend(script(config, CatalogSource(catalog), CollectorRegistry()))
    files = {path.name: path.read_bytes() for path in Path(config.base).iterdir()}
    service = RouterService(config, backend, lambda digest: Catalog(open_store(config.store), digest), files)

    async def scrape() -> list[Any]:
        return []

    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(build_api(service, RouterMetrics(), scrape), log_level="warning"))

    async def serve() -> None:
        await running.serve([listener])
        await backend.engine.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    for _ in range(200):
        if httpx.get(f"{url}/models").is_success:
            break
        time.sleep(0.02)
    try:
        yield url
    finally:
        running.should_exit = True
        thread.join(10)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a scripted engine."""
    base = save_base_files(tmp_path / "base")
    (tmp_path / "store").mkdir()
    config = AppConfig(
        base=str(base),
        base_name="tiny",
        store=StoreConfig(url=(tmp_path / "store").as_uri()),
        engine=EngineConfig(max_model_len=256),
    )
    with served(config, Script()) as url:
        yield url


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_a_server_is_scored(server: str, tmp_path: Path, chat: bool) -> None:
    def answer(question: str) -> str:
        body: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0}
        if chat:
            body |= {"messages": [{"role": "user", "content": question}]}
            choice = httpx.post(f"{server}/chat/completions", json=body).json()["choices"][0]
            return str(choice["message"]["content"])
        return str(httpx.post(f"{server}/completions", json=body | {"prompt": question}).json()["choices"][0]["text"])

    rows = [
        {"question": question, "answer": answer(question) if i % 4 else "no"} for i, question in enumerate(QUESTIONS)
    ]
    write_task(tmp_path / "tasks", "says", GENERATED, rows)
    asked = ("--model", "tiny", "--tasks", "says", "--include", tmp_path / "tasks", *(["--chat"] if chat else []))
    told = scores(server, *asked)
    assert told["version"] is None
    assert [(score["name"], score["value"]) for score in told["scores"]] == [("says:exact_match", 0.75)]


def test_a_server_that_refuses_or_is_not_there(server: str, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "says", GENERATED, [{"question": "what?", "answer": "no"}])
    asked = ("--tasks", "says", "--include", tmp_path / "tasks")
    for url, name, hint in ((server, "nobody", "404"), ("http://127.0.0.1:9/v1", "tiny", "127.0.0.1")):
        code, _, told = deltazip("eval", url, "--model", name, *asked)
        assert code == 1
        assert "lm-eval could not score says" in told
        assert hint in told


def test_given_answers_are_scored_by_their_likelihood(zoo: Zoo, tmp_path: Path) -> None:
    """What the harness computes from echoed logprobs is what transformers say of the merged weights."""
    tokenizer, oracle = make_tokenizer(), zoo.oracles[zoo.versions[0].version]

    def likelihood(question: str, answer: str) -> float:
        asked, tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
        logprobs = oracle.logits([*asked, *tokens]).log_softmax(-1)[len(asked) - 1 : -1]
        return float(logprobs.gather(1, torch.tensor(tokens)[:, None]).sum())

    choices, rows = ["ab", "cd", "ef", "gh"], []
    for question in QUESTIONS:
        found = [likelihood(question, choice) for choice in choices]
        rows.append({"question": question, "choices": choices, "gold": found.index(max(found))})
    write_task(tmp_path / "tasks", "pairs", CHOICE, rows)
    config = AppConfig(
        base=str(zoo.base), store=StoreConfig(url=zoo.store.root.as_uri()), engine=EngineConfig(**SETTINGS)
    )
    asked = ("--tasks", "pairs", "--include", tmp_path / "tasks", "--tokenizer", zoo.base)
    with served(config, RealEngine(zoo.versions[0].manifest.base.digest)) as url:
        (score,) = scores(url, "--model", "variant-0", *asked)["scores"]
        (other,) = scores(url, "--model", "base", *asked)["scores"]
    assert (score["name"], score["value"], score["samples"]) == ("pairs:acc", 1.0, len(QUESTIONS))
    assert other["value"] < 1
