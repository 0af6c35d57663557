"""Whatever arrives, fails and is aborted: everybody else finishes, with the right tokens, and blocks add up.

The "model" writes each token it runs into the KV block that the batch names, and draws the next token from what it
reads back through the block table, so that a wrong table, a lost block, a block of another version or a skipped token
changes the output. It runs batches when they are launched, so that with one step ahead it knows what they carry only
as ``DRAWN``.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from deltazip_ray.config import EngineConfig
from deltazip_ray.errors import EngineError, PromptTooLong
from deltazip_ray.scheduler.batch import DRAWN, Batch, Chunk, Drawn
from deltazip_ray.scheduler.outbox import End
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams, TokenChunk, TokenLogprobs
from deltazip_ray.scheduler.scheduler import Scheduler

VOCABULARY = 50
STOP = 0
VERSIONS = (None, "v0", "v1", "v2")
LENT = 9
"""Blocks of a slot."""
Ran = tuple[list[int], list[list[TokenLogprobs]]]
"""What a step drew, and what it told of prompts."""


def next_token(version: str | None, context: Sequence[int]) -> int:
    """A token that depends on the version, on every token before it and on their order."""
    value = 17 + VERSIONS.index(version)
    for token in context:
        value = (value * 31 + token + 7) % 1_000_003
    return value % VOCABULARY


def oracle(request: GenerateRequest) -> tuple[list[int], str]:
    """The output of a request alone, and why it ends."""
    context = list(request.prompt)
    output: list[int] = []
    while len(output) < request.sampling.max_tokens:
        token = next_token(request.version, context)
        if token == STOP:
            return output, "stop"
        context.append(token)
        output.append(token)
    return output, "length"


def scores(request: GenerateRequest) -> list[TokenLogprobs]:
    """What a request for the log-probabilities of its prompt is told."""
    if request.sampling.prompt_logprobs is None:
        return []
    prompt = request.prompt
    return [
        TokenLogprobs(next_token(request.version, prompt[: i + 1]), rank=prompt[i + 1]) for i in range(len(prompt) - 1)
    ]


class PagedModel:
    """Keeps the tokens themselves as the KV cache, beside the version that computed them."""

    def __init__(self, config: EngineConfig) -> None:
        self.size = config.block_size
        blocks = (config.kv_blocks or 0) + LENT * config.slots
        self.cache: list[tuple[str | None, int] | None] = [None] * (blocks * config.block_size)
        self.drawn: list[int] = []

    def launch(self, batch: Batch) -> Ran:
        self.check_writes(batch)
        for chunk in batch.chunks:
            tokens = chunk.tokens
            if tokens == (DRAWN,):
                assert chunk.drawn_row >= 0
                tokens = (self.drawn[chunk.drawn_row],)
            for offset, token in enumerate(tokens):
                self.cache[self._place(chunk, chunk.start + offset)] = (chunk.sequence.request.version, token)
        self.drawn = [self._draw(chunk, chunk.start + len(chunk.tokens)) for chunk in batch.sampling_chunks]
        return self.drawn, [self._score(chunk) for chunk in batch.scoring_chunks]

    def _score(self, chunk: Chunk) -> list[TokenLogprobs]:
        """For each wanted row, what would be drawn there, and the token that the prompt has behind it."""
        return [
            TokenLogprobs(self._draw(chunk, position + 1), rank=target)
            for position, target in zip(chunk.scored, chunk.targets, strict=True)
        ]

    def check_writes(self, batch: Batch) -> None:
        """Nobody writes to a block that somebody else reads."""
        holders = [block for chunk in batch.chunks for block in chunk.block_table]
        for chunk in batch.chunks:
            for block in chunk.block_table[chunk.start // self.size :]:
                assert holders.count(block) == 1

    def _place(self, chunk: Chunk, position: int) -> int:
        return chunk.block_table[position // self.size] * self.size + position % self.size

    def _draw(self, chunk: Chunk, length: int) -> int:
        version = chunk.sequence.request.version
        context = []
        for position in range(length):
            held = self.cache[self._place(chunk, position)]
            assert held is not None
            assert held[0] == version
            context.append(held[1])
        return next_token(version, context)


class Driver:
    """A scheduler with its model, as the step loop uses them, checked after each step."""

    def __init__(self, config: EngineConfig, *, ahead: bool) -> None:
        self.config = config
        self.sched = Scheduler(config)
        self.model = PagedModel(config)
        self.ahead = ahead
        self.lent = 0
        self.live: dict[str, GenerateRequest] = {}
        self.output: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.failed: set[str] = set()
        self.launched: deque[tuple[Batch, Ran | None]] = deque()

    def add(self, request: GenerateRequest) -> bool:
        try:
            self.sched.add(request, VERSIONS.index(request.version) - 1)
        except PromptTooLong:
            total = len(request.prompt) + request.sampling.max_tokens
            own = (self.config.kv_blocks or 0) * self.config.block_size
            assert total > self.config.max_model_len or total - 1 > own
            return False
        self.live[request.request_id] = request
        self.output[request.request_id] = []
        return True

    def abort(self, name: str) -> None:
        if name in self.live:
            self.aborted.add(name)
            self.sched.abort(name)
            self.hear_all()

    def lend(self) -> None:
        """Lend the next slot's blocks, which hold anything."""
        self.sched.blocks.lend(self.slot_blocks(self.lent))
        self.lent += 1

    def take_back(self) -> None:
        """Take back the last one, as the step loop does: when no batch is on its way."""
        while self.launched:
            self.finish(*self.launched.popleft())
        self.lent -= 1
        blocks = self.slot_blocks(self.lent)
        self.sched.take_back(blocks)
        for position in range(blocks.start * self.config.block_size, blocks.stop * self.config.block_size):
            self.model.cache[position] = ("a delta", 0)

    def slot_blocks(self, slot: int) -> range:
        first = (self.config.kv_blocks or 0) + slot * LENT
        return range(first, first + LENT)

    def step(self, *, fails: bool = False) -> None:
        batch = self.sched.schedule()
        assert bool(batch) or self.launched or not self.sched.has_work, "a step always does something"
        if batch:
            self.check_batch(batch)
            self.launched.append((batch, None if fails else self.model.launch(batch)))
        keep = 1 if self.ahead and batch and not fails else 0
        while len(self.launched) > keep:
            self.finish(*self.launched.popleft())
        self.sched.check()

    def finish(self, batch: Batch, ran: Ran | None) -> None:
        if ran is None:
            self.failed |= {chunk.request_id for chunk in batch.chunks}
            self.sched.fail(batch, EngineError("a step failed"))
        else:
            self.sched.update(batch, Drawn(ran[0]), ran[1])
        self.hear_all()

    def hear_all(self) -> None:
        for name, news in self.sched.take_news():
            self.hear(name, news)

    def hear(self, name: str, news: End) -> None:
        assert all(name != c.request_id for b, _ in self.launched for c in b.chunks) or not ended(news)
        request = self.live[name]
        if isinstance(news, TokenChunk):
            assert name not in self.aborted or ended(news)
            assert list(news.prompt_logprobs) == ([] if self.output[name] else scores(request))
            self.output[name] += news.tokens
            if news.finish_reason is not None:
                assert (self.output[name], news.finish_reason) == oracle(request)
        else:
            assert name in (self.aborted if news is None else self.failed)
        if ended(news):
            del self.live[name]

    def check_batch(self, batch: Batch) -> None:
        config = self.config
        assert batch.num_tokens <= config.max_batch_tokens
        assert len(batch.chunks) <= config.max_running
        slots = batch.segments()[1]
        assert len(slots) == len(set(slots))
        unfinished = [chunk for chunk in batch.chunks if not chunk.samples]
        assert len(unfinished) <= 1
        for chunk in batch.chunks:
            assert chunk.tokens
            assert len(chunk.block_table) * config.block_size >= chunk.start + len(chunk.tokens)
        if not self.launched:
            assert len(batch.chunks) == self.sched.num_running, "all that run advance in every step"

    def check_end(self) -> None:
        assert not self.live
        assert not self.sched.has_work
        assert self.sched.blocks.free_blocks == self.config.kv_blocks


def ended(news: End) -> bool:
    return not isinstance(news, TokenChunk) or news.finish_reason is not None


@dataclass(frozen=True)
class Arrival:
    step: int
    version: str | None
    common: int
    """Tokens of a prefix that all prompts share."""
    prompt: tuple[int, ...]
    max_tokens: int
    priority: int
    sequential: bool
    scored: bool
    abort_after: int | None

    def request(self, name: str) -> GenerateRequest:
        sampling = SamplingParams(
            max_tokens=self.max_tokens,
            stop_token_ids=frozenset({STOP}),
            repetition_penalty=1.1 if self.sequential else 1.0,
            prompt_logprobs=0 if self.scored else None,
        )
        return GenerateRequest(
            name, self.version, (5,) * self.common + self.prompt, sampling, priority=self.priority, weight=1.5
        )


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 25),
    version=st.sampled_from(VERSIONS),
    common=st.integers(0, 20),
    prompt=st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=15).map(tuple),
    max_tokens=st.integers(1, 20),
    priority=st.integers(-2, 2),
    sequential=st.booleans(),
    scored=st.booleans(),
    abort_after=st.none() | st.integers(0, 12),
)
configs = st.builds(
    EngineConfig,
    max_batch_tokens=st.integers(1, 24),
    max_running=st.integers(1, 8),
    kv_blocks=st.integers(1, 24),
    block_size=st.integers(1, 5),
    max_model_len=st.just(50),
    kv_prefix_cache=st.booleans(),
    fair_lead_tokens=st.integers(1, 200),
    priority_step_tokens=st.integers(0, 50),
)


@settings(max_examples=300, deadline=None)
@given(
    config=configs,
    plan=st.lists(arrivals, max_size=14),
    ahead=st.booleans(),
    failures=st.sets(st.integers(0, 40), max_size=2),
)
def test_everybody_finishes_with_the_output_of_a_request_alone(
    config: EngineConfig, plan: list[Arrival], ahead: bool, failures: set[int]
) -> None:
    driver = Driver(config, ahead=ahead)
    todo = deque(sorted(enumerate(plan), key=lambda item: item[1].step))
    aborts: dict[str, int] = {}
    now, work = 0, 0
    while todo or driver.sched.has_work:
        while todo and todo[0][1].step <= now:
            index, arrival = todo.popleft()
            request = arrival.request(str(index))
            if driver.add(request):
                work += len(request.prompt) + arrival.max_tokens
                if arrival.abort_after is not None:
                    aborts[request.request_id] = now + arrival.abort_after
        for name in [name for name, when in aborts.items() if when == now]:
            driver.abort(name)
        driver.step(fails=now in failures)
        now += 1
        assert now <= 26 + 2 * work * (len(plan) + 1), "no livelock: somebody advances by a token in every other step"
    driver.check_end()


def test_a_thousand_requests_with_random_cancellations_leak_nothing_while_slots_are_lent_and_taken_back() -> None:
    dice = random.Random(11)
    config = EngineConfig(max_batch_tokens=96, max_running=24, kv_blocks=40, slots=4, block_size=8, max_model_len=256)
    driver = Driver(config, ahead=True)
    taken_back = 0
    for i in range(1000):
        arrival = Arrival(
            step=0,
            version=dice.choice(VERSIONS),
            common=dice.choice((0, 0, 20, 60)),
            prompt=tuple(dice.randint(1, VOCABULARY - 1) for _ in range(dice.randint(1, 80))),
            max_tokens=dice.randint(1, 90),
            priority=dice.choice((0, 0, 0, 1, -1)),
            sequential=dice.random() < 0.1,
            scored=dice.random() < 0.1,
            abort_after=None,
        )
        assert driver.add(arrival.request(str(i)))
        for _ in range(dice.randint(0, 4)):
            driver.step(fails=dice.random() < 0.002)
        if dice.random() < 0.3 and driver.live:
            driver.abort(dice.choice(list(driver.live)))
        if dice.random() < 0.1 and driver.lent < config.slots:
            driver.lend()
        elif dice.random() < 0.1 and driver.lent:
            before = driver.sched.preemptions
            driver.take_back()
            taken_back += driver.sched.preemptions - before
    while driver.sched.has_work:
        driver.step()
    while driver.lent:
        driver.take_back()
    driver.check_end()
    assert taken_back > 50
    finished = 1000 - len(driver.aborted | driver.failed)
    assert finished > 500
    assert len(driver.aborted) > 150
    assert driver.failed
    assert driver.sched.preemptions > 20
    assert driver.sched.admission.prefix_hits > 1000
