"""Fetch threads, shared fairly between versions, so that a large, slow or broken one does not delay the others."""

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_SHARE = 3
"""A version may have this many threads for each one that is left idle."""


@dataclass(eq=False)
class Job(Generic[T]):
    """One call to make in a thread, for a version."""

    version: str
    run: Callable[[], T]
    done: Callable[[Future[T]], None]
    ahead: bool
    """Whether nobody waits for it yet."""


@dataclass
class _Share(Generic[T]):
    """One version's jobs."""

    waiting: deque[Job[T]] = field(default_factory=deque)
    ahead: deque[Job[T]] = field(default_factory=deque)
    """Jobs that nobody waits for yet."""
    running: int = 0

    def queue(self, job: Job[T]) -> deque[Job[T]]:
        """The queue that ``job`` is in until it starts."""
        return self.ahead if job.ahead else self.waiting


class FetchPool(Generic[T]):
    """Versions take turns: a free thread serves the version whose arrival or last turn was the longest time ago.

    In a ``shared`` pool a version gets more than one thread only while at least a third as many stay idle (Choudhury
    and Hahne, "Dynamic queue length thresholds", 1998). Of 16 threads one version gets 12, and if a second one hangs
    too, the third still finds a thread. The jobs of one version start in order. Jobs that nobody waits for yet start
    when there are no others, and get at most half of the threads, so that others soon find one.
    Belongs to one event loop.
    """

    def __init__(self, threads: int, *, shared: bool) -> None:
        """``shared``: whether a version leaves threads idle for others that may come."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="deltazip-fetch")
        self._idle = threads
        self._ahead_idle = max(1, threads // 2)
        self._shared = shared
        self._shares: dict[str, _Share[T]] = {}  # whose turn it is comes first

    def submit(
        self, version: str, run: Callable[[], T], done: Callable[[Future[T]], None], *, ahead: bool = False
    ) -> Job[T]:
        """Call ``run`` in a thread, and then ``done`` on the event loop with the result."""
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
        """Drop a job without calling its ``done``; False when it has already started."""
        share = self._shares.get(job.version)
        if share is None or job not in share.queue(job):
            return False
        share.queue(job).remove(job)
        self._forget_idle(job.version)
        return True

    def shutdown(self) -> None:
        """Wait for the running jobs; the others must have been cancelled before. Blocking."""
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
        """The next job to start, if any may."""
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
