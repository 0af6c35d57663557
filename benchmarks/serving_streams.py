"""How often clients hear of their tokens when many of them stream, and what that costs the server's processes."""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving_run import processes

WARM_S = 3.0
PROCESSES = {
    "replica": (b"ServeReplica:deltazip:replica",),
    "router": (b"ServeReplica:deltazip:router",),
    "proxy": (b"ProxyActor", b"/haproxy"),
}
"""Of the way of a token, by what their command lines have."""


async def measure(
    port: int, folder: Path, models: Sequence[str], streams: int, seconds: float, length: int
) -> dict[str, Any]:
    """``streams`` clients ask ``models`` in turn for ``length`` tokens, again and again.

    First tokens and the longest silence of all are those since they came, everything else from the fourth second on.
    """
    answers: list[list[list[float]]] = [[] for _ in range(streams)]
    asked = [{"model": models[i % len(models)], "prompt": [i + 1] * 16, "max_tokens": length} for i in range(streams)]
    came = time.perf_counter()
    tasks = [asyncio.create_task(_take(port, *pair)) for pair in zip(asked, answers, strict=True)]
    await asyncio.sleep(WARM_S)
    before, spent, since = await _counted(port), _cpu_seconds(folder), time.perf_counter()
    await asyncio.sleep(seconds)
    after, until, ended = await _counted(port), _cpu_seconds(folder), time.perf_counter()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    count, step_s, rows = (b - a for a, b in zip(before, after, strict=True))
    tokens = rows / step_s * (ended - since)  # what is counted is up to a second old
    heard = sorted(at for many in answers for one in many for at in one[1:] if at < ended)
    first = [(*one[1:], ended)[0] - one[0] for one, *_ in answers]
    gaps = [b - a for many in answers for one in many for a, b in pairwise(one[1:]) if since < b and a < ended]
    return {
        "streams": streams,
        "step_ms": 1e3 * step_s / count,
        "tokens_per_s": rows / step_s,
        "groups_per_s": len(gaps) / (ended - since),
        "first_ms": _percentiles(first) | {"max": 1e3 * max(first)},
        "silent_ms": 1e3 * max(b - a for a, b in pairwise([came, *heard, ended])),
        "gap_ms": _percentiles(gaps),
        "cpu_us_per_token": {name: 1e6 * (until[name] - spent[name]) / tokens for name in spent},
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    quantiles = statistics.quantiles(seconds, n=100)
    return {f"p{percent}": 1e3 * quantiles[percent - 1] for percent in (50, 90, 99)}


async def _take(port: int, asked: dict[str, Any], answers: list[list[float]]) -> None:
    """Note for each answer when it was asked for and when tokens of it come; a client of its own would take the time
    of what is measured."""
    body = json.dumps(asked | {"temperature": 0, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    while True:
        answers.append([time.perf_counter()])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + body)
            while data := await reader.read(1 << 16):
                if b"data:" in data:
                    answers[-1].append(time.perf_counter())
        finally:
            writer.close()


async def _counted(port: int) -> tuple[float, float, float]:
    """Steps that the replica has made, their seconds, and their rows: nearly all of them make a token here."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://127.0.0.1:{port}/metrics", timeout=10)).text
    told = {
        sample.name.removeprefix("deltazip_engine_step_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("deltazip_engine_step_") and "le" not in sample.labels
    }
    return told["seconds_count"], told["seconds_sum"], told["rows_sum"]


def _cpu_seconds(folder: Path) -> dict[str, float]:
    """CPU time of the processes of the way, until now."""
    spent = {}
    for name, marks in PROCESSES.items():
        there = {process for mark in marks for process in processes(folder, mark)}
        ticks = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:13] for one in there]
        spent[name] = sum(int(part) for both in ticks for part in both) / os.sysconf("SC_CLK_TCK")
    return spent
