"""The thread that steps, with a device that is told what to do: what overlaps, what fails, and how it ends."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine import step_loop
from deltazip_ray.engine.step_loop import MOST_FAILURES, StepLoop
from deltazip_ray.errors import DeltaZipError, EngineError
from deltazip_ray.observability.engine_metrics import EngineMetrics, EngineStats
from deltazip_ray.scheduler.batch import Batch, Drawn, Scores
from deltazip_ray.scheduler.outbox import End, News
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams, TokenChunk
from deltazip_ray.scheduler.scheduler import Scheduler

TOKEN = 7


@dataclass
class Device:
    """Draws the same token always, and keeps a diary."""

    diary: list[str] = field(default_factory=list)
    bad_launches: set[int] = field(default_factory=set)
    bad_waits: set[int] = field(default_factory=set)
    lost_from: int | None = None
    """Step at whose wait the device is lost."""
    launches: int = 0
    waits: int = 0

    def launch(self, batch: Batch) -> "Step":
        step = self.launches
        self.launches += 1
        self.diary.append(f"launch {step}")
        if step in self.bad_launches:
            raise ValueError(f"launch {step} is bad")
        return Step(self, step, len(batch.sampling_chunks))

    def synchronize(self) -> None:
        if self.lost_from is not None and self.waits > self.lost_from:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@dataclass
class Step:
    device: Device
    number: int
    draws: int

    def wait(self) -> Drawn:
        self.device.diary.append(f"wait {self.number}")
        self.device.waits += 1
        lost = self.device.lost_from
        if self.number in self.device.bad_waits or (lost is not None and self.number >= lost):
            raise RuntimeError(f"step {self.number} is bad")
        return Drawn([TOKEN] * self.draws)

    def scores(self) -> Sequence[Scores]:
        return []


class Running:
    """A loop and what it said."""

    def __init__(self, device: Device, *, ahead: bool) -> None:
        self.heard: queue.Queue[tuple[str, End]] = queue.Queue()
        self.ended = threading.Event()
        metrics = EngineMetrics(CollectorRegistry(), lambda: EngineStats(frozenset(), frozenset(), 0, 0, 0, 0, 1))
        config = EngineConfig(kv_blocks=64, block_size=4, max_batch_tokens=16)
        self.loop = StepLoop(
            Scheduler(config), device, metrics, self._publish, self.ended.set, ahead=ahead, threads=None
        )

    def _publish(self, news: News) -> None:
        for item in news:
            self.heard.put(item)

    def add(self, name: str, max_tokens: int, stop: int = -1) -> None:
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({stop}))
        self.loop.add(GenerateRequest(name, None, (1, 2, 3), params), -1)

    def ends(self, count: int) -> dict[str, End]:
        """The next ``count`` ends, with all tokens heard before."""
        found: dict[str, End] = {}
        tokens: dict[str, tuple[int, ...]] = {}
        while len(found) < count:
            name, item = self.heard.get(timeout=10)
            if not isinstance(item, TokenChunk):
                found[name] = item
                continue
            tokens[name] = tokens.get(name, ()) + item.tokens
            if item.finish_reason is not None:
                found[name] = item._replace(tokens=tokens[name])
        return found

    def check(self) -> DeltaZipError | None:
        verdict: queue.Queue[DeltaZipError | None] = queue.Queue()
        self.loop.check(verdict.put)
        return verdict.get(timeout=10)


def iter_heard(run: Running) -> Iterator[tuple[str, End]]:
    while not run.heard.empty():
        yield run.heard.get()


@contextmanager
def running(device: Device, *, ahead: bool) -> Iterator[Running]:
    run = Running(device, ahead=ahead)
    run.add("first", 3)
    run.loop.start()
    try:
        yield run
    finally:
        run.loop.stop()
        assert run.ended.is_set()


def test_ahead_the_next_step_is_launched_before_the_one_before_is_waited_for() -> None:
    device = Device()
    with running(device, ahead=True) as run:
        assert run.ends(1) == {"first": TokenChunk((TOKEN,) * 3, "length")}
        assert device.diary == ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1", "wait 2"]
        assert run.check() is None


def test_tokens_are_told_behind_a_launch_but_first_ones_and_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "READER_S", 1e-9)
    device = Device()
    run = Running(device, ahead=True)
    monkeypatch.setattr(run.loop, "_publish", lambda news: device.diary.append("tell") or run._publish(news))
    run.add("first", 4)
    run.loop.start()
    run.ends(1)
    run.loop.stop()
    begins = ["launch 0", "launch 1", "wait 0", "tell"]
    assert device.diary == [*begins, "launch 2", "wait 1", "launch 3", "tell", "wait 2", "tell", "wait 3", "tell"]


def test_else_one_step_after_the_other() -> None:
    device = Device()
    with running(device, ahead=False) as run:
        run.ends(1)
        assert device.diary == ["launch 0", "wait 0", "launch 1", "wait 1", "launch 2", "wait 2"]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", ["bad_launches", "bad_waits"])
def test_a_step_that_fails_fails_its_requests_and_the_loop_goes_on(ahead: bool, kind: str) -> None:
    device = Device(**{kind: {1}})  # type: ignore[arg-type]
    with running(device, ahead=ahead) as run:
        end = run.ends(1)["first"]
        assert isinstance(end, EngineError)
        assert "1 is bad" in end.message
        run.add("second", 3)
        assert run.ends(1) == {"second": TokenChunk((TOKEN,) * 3, "length")}
        assert run.check() is None
        assert not run.ended.is_set()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_lost_device_ends_the_loop(ahead: bool, caplog: pytest.LogCaptureFixture) -> None:
    with running(Device(lost_from=1), ahead=ahead) as run:
        assert run.ended.wait(10)
        assert [item for _, item in iter_heard(run)] == [TokenChunk((TOKEN,))], "who stops the engine tells the rest"
    assert "the device is lost" in caplog.text


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_that_fail_in_a_row_end_the_loop_though_the_device_answers(
    ahead: bool, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(bad_waits=set(range(1, 99)))
    with running(device, ahead=ahead) as run:
        while device.waits < MOST_FAILURES:
            assert all(isinstance(end, EngineError) for end in run.ends(1).values())
            run.add(f"after {device.waits}", 1)
        assert run.ended.wait(10)
        assert run.heard.empty(), "who stops the engine tells the last one"
    assert device.waits == 1 + MOST_FAILURES
    assert caplog.text.count("steps in a row failed") == 1


def test_failures_with_a_good_step_between_them_do_not_count_together() -> None:
    with running(Device(bad_waits=set(range(0, 99, 2))), ahead=False) as run:
        for i in range(3 * MOST_FAILURES):
            run.ends(1)
            run.add(f"next {i}", 1)
        run.ends(1)
        assert not run.ended.is_set()


def test_stopping_waits_for_the_step_on_its_way() -> None:
    device = Device()
    run = Running(device, ahead=True)
    run.add("long", 10_000 // 64)
    run.loop.start()
    run.heard.get(timeout=10)
    run.loop.stop()
    assert sorted(device.diary) == sorted(f"{what} {i}" for what in ("launch", "wait") for i in range(device.launches))


def test_blocks_are_taken_back_when_no_step_reads_them_and_requests_go_on() -> None:
    device = Device()
    left: queue.Queue[int] = queue.Queue()
    with running(device, ahead=True) as run:
        run.loop.lend(range(100, 104))
        run.add("long", 240)
        run.loop.take_back(range(100, 104), lambda: left.put(len(device.diary)))
        before = device.diary[: left.get(timeout=10)]
        launched, waited = (sum(line.startswith(word) for line in before) for word in ("launch", "wait"))
        assert launched == waited
        assert run.ends(2).keys() == {"first", "long"}
        assert run.check() is None


def test_a_stop_token_ends_one_step_late_and_once() -> None:
    device = Device()
    with running(device, ahead=True) as run:
        run.ends(1)
        run.add("stopped", 5, stop=TOKEN)
        assert run.ends(1) == {"stopped": TokenChunk((), "stop")}
        assert run.heard.empty()
        assert device.launches == 5, "two for the one that stopped, of which one is wasted"


@pytest.mark.parametrize("ahead", [False, True])
def test_tokens_whose_turn_has_not_come_are_told_before_a_step_that_takes_long(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_loop, "READER_S", 1e9)
    monkeypatch.setattr(step_loop, "_LONG", 1)
    device = Device()
    run = Running(device, ahead=ahead)
    launch = device.launch

    def and_have_a_prompt_come(batch: Batch) -> Step:
        if device.launches == 5:
            run.add("prompt", 1)
        return launch(batch)

    monkeypatch.setattr(device, "launch", and_have_a_prompt_come)
    run.add("first", 20)
    run.loop.start()
    tokens = 0
    while (heard := run.heard.get(timeout=10))[0] == "first":
        assert isinstance(heard[1], TokenChunk)
        tokens += len(heard[1].tokens)
    run.loop.stop()
    assert tokens == 6


def test_a_device_that_was_lost_while_no_step_ran_is_found_by_the_check() -> None:
    device = Device()
    with running(device, ahead=True) as run:
        run.ends(1)
        device.lost_from = -1
        assert isinstance(run.check(), EngineError)
        assert run.ended.wait(10)
