"""Fetches of many versions share a few threads fairly."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import Future

import pytest

from deltazip_ray.residency.fetch_pool import FetchPool, Job
from tests.support.waiting import until


class Bench:
    """A pool whose jobs wait until they are let go, and notes on who began and ended."""

    def __init__(self, threads: int) -> None:
        self.pool = FetchPool[str](threads, shared=True)
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.errors: list[BaseException] = []
        self.may_end: dict[str, threading.Event] = {}

    def submit(self, version: str, job: int, fails: bool = False) -> Job[str]:
        name = f"{version}{job}"
        gate = self.may_end[name] = threading.Event()

        def run() -> str:
            self.begun.append(name)
            assert gate.wait(20)
            if fails:
                raise ValueError(name)
            return name

        return self.pool.submit(version, run, self.done)

    def done(self, result: Future[str]) -> None:
        error = result.exception()
        if error is not None:
            self.errors.append(error)
        else:
            self.ended.append(result.result())

    async def let_go(self, job: str) -> None:
        before = len(self.ended) + len(self.errors)
        self.may_end[job].set()
        await until(lambda: len(self.ended) + len(self.errors) == before + 1)
        await settle()

    async def end(self) -> None:
        for gate in self.may_end.values():
            gate.set()
        await until(lambda: not self.pool._shares)
        await asyncio.to_thread(self.pool.shutdown)


async def settle() -> None:
    await asyncio.sleep(0.01)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench(threads=3)
    yield made
    await made.end()


async def test_one_version_never_has_all_threads(bench: Bench) -> None:
    for index in range(6):
        bench.submit("a", index)
    await settle()
    assert sorted(bench.begun) == ["a0", "a1"]
    bench.submit("b", 0)
    await settle()
    assert bench.begun[2:] == ["b0"], "at once, though others have come before"
    for ends in ("b0", "a1"):
        await bench.let_go(ends)
    assert bench.begun[3:] == ["a2"], "b's thread stays free"


@pytest.mark.parametrize("threads", [8, 16])
async def test_versions_that_hang_leave_a_thread_to_the_next_one(threads: int) -> None:
    bench = Bench(threads)
    for version in "ab":
        for index in range(threads):
            bench.submit(version, index)
    await settle()
    assert Counter(name[0] for name in bench.begun)["a"] == threads * 3 // 4
    bench.submit("c", 0)
    await settle()
    try:
        assert bench.begun[-1] == "c0"
    finally:
        await bench.end()


async def test_versions_take_turns(bench: Bench) -> None:
    for version in "abc":
        for index in range(4):
            bench.submit(version, index)
    await settle()
    assert sorted(bench.begun) == ["a0", "a1", "b0"]
    for ends, begins in (("a0", "c0"), ("b0", "b1"), ("a1", "a2"), ("c0", "c1"), ("b1", "b2"), ("a2", "a3")):
        await bench.let_go(ends)
        assert bench.begun[-1] == begins


async def test_what_has_not_begun_can_be_cancelled(bench: Bench) -> None:
    jobs = [bench.submit("a", index) for index in range(4)]
    await settle()
    assert [bench.pool.cancel(job) for job in jobs] == [False, False, True, True]
    assert not bench.pool.cancel(jobs[3])
    await bench.let_go("a0")
    await bench.let_go("a1")
    assert sorted(bench.begun) == bench.ended == ["a0", "a1"]
    assert not bench.pool.cancel(jobs[0])


async def test_a_job_that_fails_frees_its_thread(bench: Bench) -> None:
    for index in range(4):
        bench.submit("a", index, fails=True)
    bench.submit("b", 0)
    for name in ("a0", "a1", "b0", "a2", "a3"):
        await bench.let_go(name)
    assert [str(error) for error in bench.errors] == ["a0", "a1", "a2", "a3"]
    assert bench.ended == ["b0"]


@pytest.mark.parametrize("seed", range(5))
async def test_any_mixture_ends_within_the_bounds(seed: int) -> None:
    rng = random.Random(seed)
    threads = rng.randint(1, 4)
    shared = rng.random() < 0.7
    pool = FetchPool[str](threads, shared=shared)
    lock, running, most, ended = threading.Lock(), Counter[str](), Counter[str](), Counter[str]()

    def work(version: str, pause_s: float) -> str:
        with lock:
            running[version] += 1
            most[version] = max(most[version], running[version])
            most["all"] = max(most["all"], running.total())
        threading.Event().wait(pause_s)
        with lock:
            running[version] -= 1
        return version

    jobs = []
    cancelled = 0
    for _ in range(300):
        version, pause_s = rng.choice("aaaabc"), rng.choice([0, 0.001])
        job = pool.submit(
            version, lambda v=version, p=pause_s: work(v, p), lambda result: ended.update(result.result())
        )
        jobs.append(job)
        if rng.random() < 0.2:
            cancelled += pool.cancel(rng.choice(jobs))
        if rng.random() < 0.2:
            await asyncio.sleep(0)
    await until(lambda: ended.total() == 300 - cancelled)
    assert most["all"] <= threads
    assert max(most[version] for version in "abc") <= (max(1, threads * 3 // 4) if shared else threads)
    assert pool._shares == {}
    assert pool._idle == threads
    await asyncio.to_thread(pool.shutdown)
