"""Clients of the serving benchmark: greedy answers of all models at once, and a replica that dies under load."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence

import httpx
import torch

from benchmarks.serving_models import LLAMAS
from benchmarks.serving_run import Run, processes

SHORT, LONG = 24, 200
"""Tokens of an answer."""
REPLICA = b"ServeReplica:deltazip:replica"
Answers = dict[str, list[tuple[list[int], list[int]]]]
"""Prompts and what was answered to them, by model."""


def prompt(seed: int, length: int, vocab: int) -> list[int]:
    """Random tokens."""
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


async def complete(client: httpx.AsyncClient, model: str, tokens: Sequence[int], count: int = SHORT) -> list[int]:
    """A greedy answer's tokens, ``count`` of them. Raises httpx.HTTPError."""
    asked = {"model": model, "prompt": list(tokens), "max_tokens": count, "temperature": 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=asked)
    answer.raise_for_status()
    output = [int(word[1:]) for word in answer.json()["choices"][0]["text"].split()]
    assert len(output) == count, (model, len(output))
    return output


async def answers(run: Run, each: int) -> Answers:
    """Prompts and answers by model, all asked at once."""
    vocab = LLAMAS[run.shape]["vocab_size"]
    prompts = {model: [prompt(31 * i, 8 + 40 * i, vocab) for i in range(each)] for model in run.models}
    async with httpx.AsyncClient(base_url=run.url, timeout=180) as client:
        asked = [(model, one) for i in range(each) for model, many in prompts.items() for one in [many[i]]]
        said = await asyncio.gather(*(complete(client, model, one) for model, one in asked))
    found: Answers = {model: [] for model in run.models}
    for (model, one), output in zip(asked, said, strict=True):
        found[model].append((one, output))
    return found


async def kill_under_load(run: Run, clients: int, after_s: float, until_s: float) -> Answers:
    """kill -9 of the replica while ``clients`` ask in a loop; a failed request is tried again after half a second.

    Returns each model's different answers to its one prompt.
    """
    began = time.perf_counter()
    outcomes: Counter[str] = Counter()
    done: list[float] = []
    asked = prompt(7, 20, LLAMAS[run.shape]["vocab_size"])
    found: Answers = {model: [] for model in run.models}

    async def loop(index: int, client: httpx.AsyncClient) -> None:
        model = run.models[index % len(run.models)]
        while time.perf_counter() - began < until_s:
            try:
                output = await complete(client, model, asked, LONG)
                outcomes["answered"] += 1
                if (asked, output) not in found[model]:
                    found[model].append((asked, output))
                done.append(time.perf_counter() - began)
            except httpx.HTTPStatusError as error:
                outcomes[str(error.response.status_code)] += 1
                await asyncio.sleep(0.5)
            except httpx.TransportError as error:
                outcomes[type(error).__name__] += 1
                await asyncio.sleep(0.5)

    async def kill() -> None:
        await asyncio.sleep(after_s)
        for process in processes(run.folder, REPLICA):
            os.kill(process, signal.SIGKILL)

    async with httpx.AsyncClient(base_url=run.url, timeout=until_s + 60) as client:
        await asyncio.gather(kill(), *(loop(i, client) for i in range(clients)))
    back = min((moment for moment in done if moment > after_s + 1), default=None)
    run.report["kill"] = {
        "outcomes": dict(outcomes),
        "first_answer_after_s": None if back is None else round(back - after_s, 2),
    }
    return found
