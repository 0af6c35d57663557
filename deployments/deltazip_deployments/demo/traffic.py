"""Bursty traffic that asks base and variants at once, and what became of it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deltazip_loadgen import Event, GeneratedTrace, PromptPool, Record, TraceSpec, replay
from deltazip_loadgen.prompts import Prompt
from deltazip_loadgen.spec import Gamma, Zipf
from deltazip_loadgen.trace import Message, TraceFile, write_trace

from deltazip_deployments.demo.tasks import REPEAT, Example

BURSTINESS = 3.0
"""Standard deviation over mean of the gaps between requests; Poisson traffic has 1."""
QUESTION = "question"
"""Tag of a record that holds what was asked."""
SKEW = 0.5
"""Zipf exponent of the variants' popularity: each is asked often enough to be judged."""


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

    ``base_name`` is asked under an instruction, for it does nothing without; a variant is just given its input.
    """
    pool_path = folder / "pool.jsonl"
    prompts = (
        Prompt(
            model=model, messages=_messages(model, base_name, example), expected=example.answer, max_tokens=max_tokens
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
    """Replay a trace against the server; ``advance`` is called at the end of each request."""

    def on_event(event: Event) -> None:
        if event.kind == "finished":
            advance()

    return asyncio.run(replay(trace, url, on_event=on_event))


def _messages(model: str, base_name: str, example: Example) -> tuple[Message, ...]:
    user = Message(role="user", content=example.question)
    return (Message(role="system", content=REPEAT), user) if model == base_name else (user,)
