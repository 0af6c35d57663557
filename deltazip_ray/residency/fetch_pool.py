"""Threads that fetch, shared fairly between versions, so that one that is large, slow or broken delays no other one."""

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_SHARE = 3
"""Threads of one version at most, for each that is idle beside them."""


@dataclass(eq=False)
class Job(Generic[T]):
    """What a thread is to do for a version."""

    version: str
    run: Callable[[], T]
    done: Callable[[Future[T]], None]
    ahead: bool
    """Whether nobody waits for it yet."""


@dataclass
class _Share(Generic[T]):
    """What one version has of the pool."""

    waiting: deque[Job[T]] = field(default_factory=deque)
    ahead: deque[Job[T]] = field(default_factory=deque)
    """Jobs for which nobody waits yet."""
    running: int = 0

    def queue(self, job: Job[T]) -> deque[Job[T]]:
        """Where ``job`` is until it begins."""
        return self.ahead if job.ahead else self.waiting


class FetchPool(Generic[T]):
    """Versions take turns: a thread that becomes free serves the one whose arrival or last turn is longest ago.

    In a ``shared`` pool a version takes no thread beyond its first unless a third as many as it has then are left
    idle (Choudhury and Hahne, "Dynamic queue length thresholds", 1998). Of 16 threads one version has 12, and where a
    second one hangs beside it, the third still finds a thread. Jobs of one version begin in their order. Jobs for which
    nobody waits yet begin when there are no others, and have half of the threads at most, so that others find one soon.
    It belongs to one event loop.
    """

    def __init__(self, threads: int, *, shared: bool) -> None:
        """``shared``: whether one version leaves threads to others that may come."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="deltazip-fetch")
        self._idle = threads
        self._ahead_idle = max(1, threads // 2)
        self._shared = shared
        self._shares: dict[str, _Share[T]] = {}  # whose turn it is comes first

    def submit(
        self, version: str, run: Callable[[], T], done: Callable[[Future[T]], None], *, ahead: bool = False
    ) -> Job[T]:
        """Have ``run`` called in a thread, and then ``done`` on the event loop with what has come of it."""
        job = Job(version, run, done, ahead)
        self._shares.setdefault(version, _Share()).queue(job).append(job)
        self._start_jobs()
        return job

    def hasten(self, job: Job[T]) -> None:
        """Somebody waits for a job now."""
        share = self._shares.get(job.version)
        if share is not None and job in share.ahead:
            share.ahead.remove(job)
            job.ahead = False
            share.waiting.append(job)
            self._start_jobs()

    def cancel(self, job: Job[T]) -> bool:
        """Drop a job, of which ``done`` will not hear; False when it has begun."""
        share = self._shares.get(job.version)
        if share is None or job not in share.queue(job):
            return False
        share.queue(job).remove(job)
        self._forget_idle(job.version)
        return True

    def shutdown(self) -> None:
        """Wait for the jobs that have begun. Blocking; those that have not must have been cancelled."""
        self._executor.shutdown()

    def _start_jobs(self) -> None:
        loop = asyncio.get_running_loop()
        while self._idle and (job := self._next_job()) is not None:
            share = self._shares[job.version] = self._shares.pop(job.version)
            share.queue(job).popleft()
            share.running += 1
            self._idle -= 1
            self._ahead_idle -= job.ahead
            self._executor.submit(job.run).add_done_callback(functools.partial(self._tell, loop, job))

    def _next_job(self) -> Job[T] | None:
        """The job whose turn it is."""
        ready = [share for share in self._shares.values() if self._may_start(share)]
        wanted = next((share.waiting[0] for share in ready if share.waiting), None)
        if wanted is not None or not self._ahead_idle:
            return wanted
        return next((share.ahead[0] for share in ready if share.ahead), None)

    def _may_start(self, share: _Share[T]) -> bool:
        """Whether a version may have one more thread."""
        return not self._shared or not share.running or share.running + 1 <= _SHARE * (self._idle - 1)

    def _tell(self, loop: asyncio.AbstractEventLoop, job: Job[T], result: Future[T]) -> None:
        loop.call_soon_threadsafe(self._ended, job, result)

    def _ended(self, job: Job[T], result: Future[T]) -> None:
        self._idle += 1
        self._ahead_idle += job.ahead
        self._shares[job.version].running -= 1
        self._forget_idle(job.version)
        self._start_jobs()
        job.done(result)

    def _forget_idle(self, version: str) -> None:
        share = self._shares[version]
        if not share.waiting and not share.ahead and not share.running:
            del self._shares[version]
