"""When readers hear of their tokens: first and last at once, the others in turn, and nobody is forgotten."""

from collections.abc import Callable
from typing import Any

import pytest

from deltazip_ray.engine.delivery import READER_S, Delivery
from deltazip_ray.scheduler.request import TokenChunk


class Loop:
    """An event loop whose time stands still."""

    def __init__(self) -> None:
        self.now = 1.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.timers.append((self.now + delay, callback))

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and what was due in it happen."""
        self.now += seconds
        due = [callback for at, callback in self.timers if at <= self.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.now]
        for callback in due:
            callback()


class Stream:
    """Counts when its reader was woken."""

    def __init__(self) -> None:
        self.begun = False
        self.woken = 0

    def put(self, _: TokenChunk) -> None:
        self.begun = True

    def wake(self) -> None:
        self.woken += 1


NEXT = TokenChunk((1,))
Bench = tuple[Loop, Any, list[Any]]


@pytest.fixture
def bench() -> Bench:
    """Ten streams that have had their first token."""
    loop: Any = Loop()
    delivery: Any = Delivery(loop)
    streams = [Stream() for _ in range(10)]
    step(delivery, streams)
    assert [stream.woken for stream in streams] == [1] * 10, "the first token waits for nothing"
    loop.pass_time(1.0)
    return loop, delivery, streams


def step(delivery: Any, streams: list[Any], chunk: TokenChunk = NEXT) -> None:
    """A token for each stream."""
    for stream in streams:
        delivery.put(stream, chunk)
    delivery.settle()


def test_readers_are_woken_in_turn_as_time_allows(bench: Bench) -> None:
    loop, delivery, streams = bench
    step(delivery, streams)  # there was time for all
    woken = []
    for _ in range(3):
        loop.now += 4.5 * READER_S
        step(delivery, streams)
        woken.append([i for i, stream in enumerate(streams) if stream.woken > 2])
        for stream in streams:
            stream.woken = min(stream.woken, 2)
    assert woken == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 8, 9]]


def test_the_last_token_waits_for_nothing(bench: Bench) -> None:
    _, delivery, streams = bench
    step(delivery, streams)
    step(delivery, streams)
    step(delivery, streams, TokenChunk((1,), "length"))
    assert [stream.woken for stream in streams] == [3] * 10


def test_tokens_do_not_wait_for_the_next_step(bench: Bench) -> None:
    loop, delivery, streams = bench
    step(delivery, streams)
    step(delivery, streams)
    loop.pass_time(10.5 * READER_S)
    assert [stream.woken for stream in streams] == [3] * 10
