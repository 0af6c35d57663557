"""Bursty traffic to the base and all variants."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deltazip_deployments.demo.tasks import REPEAT, Example
from deltazip_loadgen import Event, GeneratedTrace, PromptPool, Record, TraceSpec, replay
from deltazip_loadgen.prompts import Prompt
from deltazip_loadgen.spec import Gamma, Zipf
from deltazip_loadgen.trace import Message, TraceFile, write_trace

BURSTINESS = 3.0
"""Standard deviation over mean of the gaps between requests; Poisson traffic has 1."""
QUESTION = "question"
"""Tag of a record with the question."""
SKEW = 0.5
"""Zipf exponent of the models' popularity: low enough that each one gets enough questions."""
_STEP_VERSIONS = "deltazip_engine_step_versions"


def make_trace(
    folder: Path,
    questions: Mapping[str, Sequence[Example]],
    base_name: str,
    max_tokens: int,
    requests: int,
    rate: float,
    seed: int,
) -> TraceFile:
    """Write ``trace.jsonl`` to ``folder``: ``requests`` requests at ``rate`` a second to the models in ``questions``.

    Questions to ``base_name`` have an instruction; those to variants are just the input.
    """
    pool_path = folder / "pool.jsonl"
    prompts = (
        Prompt(
            model=model,
            messages=_messages(model, base_name, example),
            max_tokens=max_tokens,
            expected=example.answer,
            tags={QUESTION: example.question},
        )
        for model, examples in questions.items()
        for example in examples
    )
    pool_path.write_text("".join(prompt.model_dump_json(exclude_none=True) + "\n" for prompt in prompts))
    spec = TraceSpec(
        models=tuple(questions),
        rate=rate,
        requests=requests,
        arrivals=Gamma(cv=BURSTINESS),
        popularity=Zipf(s=SKEW),
    )
    trace = GeneratedTrace(spec, seed, PromptPool.load(pool_path))
    path = folder / "trace.jsonl"
    write_trace(path, trace.header, trace)
    return TraceFile(path)


def send(trace: TraceFile, url: str, advance: Callable[[], None]) -> list[Record]:
    """Replay a trace against the server; ``advance`` is called after each request."""

    def on_event(event: Event) -> None:
        if event.kind == "finished":
            advance()

    return asyncio.run(replay(trace, url, on_event=on_event))


def mixed_steps(url: str) -> float:
    """The share of all replicas' steps so far whose batch contained more than one model (base and variants)."""
    answer = httpx.get(f"{url}/metrics", timeout=10.0).raise_for_status()
    steps = alone = 0.0
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name == f"{_STEP_VERSIONS}_count":
                steps += sample.value
            elif sample.name == f"{_STEP_VERSIONS}_bucket" and float(sample.labels["le"]) == 1:
                alone += sample.value
    return round(1 - alone / steps, 4) if steps else 0.0


def _messages(model: str, base_name: str, example: Example) -> tuple[Message, ...]:
    user = Message(role="user", content=example.question)
    return (Message(role="system", content=REPEAT), user) if model == base_name else (user,)
