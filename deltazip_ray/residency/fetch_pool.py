"""Threads that fetch, shared fairly between versions, so that one that is large, slow or broken delays no other one."""

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Job(Generic[T]):
    """What a thread is to do for a version."""

    version: str
    run: Callable[[], T]
    done: Callable[[Future[T]], None]


@dataclass
class _Share(Generic[T]):
    """What one version has of the pool."""

    waiting: deque[Job[T]] = field(default_factory=deque)
    running: int = 0


class FetchPool(Generic[T]):
    """Versions take turns: a thread that becomes free serves the one whose arrival or last turn is longest ago.

    No version has more than ``share`` threads at once, so that one whose store does not answer leaves some to the
    others. Jobs of one version begin in their order. It belongs to one event loop.
    """

    def __init__(self, threads: int, share: int) -> None:
        """``threads`` in all, of which one version gets at most ``share``."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="deltazip-fetch")
        self._idle = threads
        self._share = share
        self._shares: dict[str, _Share[T]] = {}  # whose turn it is comes first

    def submit(self, version: str, run: Callable[[], T], done: Callable[[Future[T]], None]) -> Job[T]:
        """Have ``run`` called in a thread, and then ``done`` on the event loop with what has come of it."""
        job = Job(version, run, done)
        self._shares.setdefault(version, _Share()).waiting.append(job)
        self._start_jobs()
        return job

    def cancel(self, job: Job[T]) -> bool:
        """Drop a job, of which ``done`` will not hear; False when it has begun."""
        share = self._shares.get(job.version)
        if share is None or job not in share.waiting:
            return False
        share.waiting.remove(job)
        self._forget_idle(job.version)
        return True

    def shutdown(self) -> None:
        """Wait for the jobs that have begun. Blocking; those that have not must have been cancelled."""
        self._executor.shutdown()

    def _start_jobs(self) -> None:
        loop = asyncio.get_running_loop()
        while self._idle:
            ready = (v for v, share in self._shares.items() if share.waiting and share.running < self._share)
            version = next(ready, None)
            if version is None:
                return
            share = self._shares[version] = self._shares.pop(version)
            job = share.waiting.popleft()
            share.running += 1
            self._idle -= 1
            self._executor.submit(job.run).add_done_callback(functools.partial(self._tell, loop, job))

    def _tell(self, loop: asyncio.AbstractEventLoop, job: Job[T], result: Future[T]) -> None:
        loop.call_soon_threadsafe(self._ended, job, result)

    def _ended(self, job: Job[T], result: Future[T]) -> None:
        self._idle += 1
        self._shares[job.version].running -= 1
        self._forget_idle(job.version)
        self._start_jobs()
        job.done(result)

    def _forget_idle(self, version: str) -> None:
        share = self._shares[version]
        if not share.waiting and not share.running:
            del self._shares[version]
