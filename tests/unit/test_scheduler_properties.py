"""Whatever arrives and whatever is aborted: everybody finishes, in order, with the right tokens, and blocks add up.

The "model" writes each token it runs into the KV block that the batch names, and draws the next token from what it
reads back through the block table, so that a wrong table, a lost block or a skipped token changes the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from deltazip_ray.config import EngineConfig
from deltazip_ray.errors import PromptTooLong
from deltazip_ray.scheduler.batch import Batch, Chunk
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams
from deltazip_ray.scheduler.scheduler import Scheduler

VOCABULARY = 50
STOP = 0


def next_token(context: Sequence[int]) -> int:
    """A token that depends on every token before it and on their order."""
    value = 17
    for token in context:
        value = (value * 31 + token + 7) % 1_000_003
    return value % VOCABULARY


def oracle(request: GenerateRequest) -> list[int]:
    """The output of a request alone."""
    context = list(request.prompt)
    output: list[int] = []
    while len(output) < request.sampling.max_tokens:
        token = next_token(context)
        if token == STOP:
            break
        context.append(token)
        output.append(token)
    return output


class PagedModel:
    """Keeps the tokens themselves as the KV cache."""

    def __init__(self, config: EngineConfig) -> None:
        self.block_size = config.block_size
        self.cache: list[int | None] = [None] * (config.kv_blocks * config.block_size)

    def run(self, batch: Batch) -> list[int]:
        for chunk in batch.chunks:
            for offset, token in enumerate(chunk.tokens):
                self.cache[self._place(chunk, chunk.start + offset)] = token
        return [self._draw(chunk) for chunk in batch.sampling_chunks]

    def _place(self, chunk: Chunk, position: int) -> int:
        return chunk.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def _draw(self, chunk: Chunk) -> int:
        context = [self.cache[self._place(chunk, p)] for p in range(chunk.start + len(chunk.tokens))]
        assert None not in context
        return next_token([token for token in context if token is not None])


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    slot: int
    abort_after: int | None


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 25),
    prompt=st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=30).map(tuple),
    max_tokens=st.integers(1, 20),
    slot=st.integers(-1, 3),
    abort_after=st.none() | st.integers(0, 12),
)
configs = st.builds(
    EngineConfig,
    max_batch_tokens=st.integers(1, 24),
    max_running=st.integers(1, 8),
    kv_blocks=st.integers(1, 24),
    block_size=st.integers(1, 5),
    max_model_len=st.just(50),
)


def check_batch(batch: Batch, config: EngineConfig) -> None:
    assert batch.num_tokens <= config.max_batch_tokens
    assert len(batch.chunks) <= config.max_running
    starts, slots = batch.segments()
    assert slots == sorted(set(slots))
    assert (starts[0], starts[-1]) == (0, batch.num_tokens)
    places = [block for chunk in batch.chunks for block in chunk.block_table]
    assert len(places) == len(set(places)), "no two sequences share a block"
    for chunk in batch.chunks:
        assert chunk.tokens
        assert len(chunk.block_table) * config.block_size >= chunk.start + len(chunk.tokens)
        assert chunk.samples == (chunk.start + len(chunk.tokens) == len(chunk.sequence))


@settings(max_examples=200, deadline=None)
@given(config=configs, plan=st.lists(arrivals, max_size=14))
def test_everybody_finishes_with_the_output_of_a_request_alone(config: EngineConfig, plan: list[Arrival]) -> None:
    sched, model = Scheduler(config), PagedModel(config)
    todo = sorted(enumerate(plan), key=lambda item: item[1].step)
    live: dict[str, GenerateRequest] = {}
    order: list[str] = []
    started: list[str] = []
    output: dict[str, list[int]] = {}
    aborts: dict[str, int] = {}
    now, work = 0, 0
    while todo or sched.has_work:
        while todo and todo[0][1].step <= now:
            index, arrival = todo.pop(0)
            request = GenerateRequest(
                str(index),
                None,
                arrival.prompt,
                SamplingParams(max_tokens=arrival.max_tokens, stop_token_ids=frozenset({STOP})),
            )
            try:
                sched.add(request, arrival.slot)
            except PromptTooLong:
                total = len(request.prompt) + arrival.max_tokens
                assert total > 50 or total - 1 > config.kv_blocks * config.block_size
                continue
            live[request.request_id] = request
            output[request.request_id] = []
            order.append(request.request_id)
            work += len(request.prompt) + arrival.max_tokens
            if arrival.abort_after is not None:
                aborts[request.request_id] = now + arrival.abort_after
        for name in [name for name, when in aborts.items() if when == now and name in live]:
            assert sched.abort(name)
            del live[name]
            order.remove(name)
        batch = sched.schedule()
        check_batch(batch, config)
        assert bool(batch) == sched.has_work, "a step always does something"
        if batch:
            assert len(batch.chunks) == sched.num_running, "all that run advance in every step"
            oldest = next(name for name in order if name in live)
            assert oldest in {chunk.request_id for chunk in batch.chunks}, "and the oldest runs"
            running = [c.request_id for c in batch.chunks]
            first_seen = [name for name in order if name in running and name not in started]
            started += first_seen
            assert [n for n in order if n in started] == order[: sum(n in started for n in order)], "first come first"
        for name, news in sched.update(batch, model.run(batch)).items():
            output[name] += news.tokens
            if news.finish_reason is not None:
                expected = oracle(live[name])
                assert output[name] == expected
                assert news.finish_reason == ("length" if len(expected) == live[name].sampling.max_tokens else "stop")
                del live[name]
        sched.check()
        now += 1
        assert now <= 26 + work * (len(plan) + 1), "no livelock: each step advances the oldest by a token"
    assert not live
    assert sched.blocks.free_blocks == config.kv_blocks
