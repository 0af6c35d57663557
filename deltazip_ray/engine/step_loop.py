"""The thread that runs steps: takes commands, publishes tokens. Independent of asyncio."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from deltazip_ray.errors import DeltaZipError, EngineError
from deltazip_ray.observability.engine_metrics import EngineMetrics
from deltazip_ray.scheduler.batch import Batch, Drawn, Scores
from deltazip_ray.scheduler.outbox import News
from deltazip_ray.scheduler.request import GenerateRequest
from deltazip_ray.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Exceptions of torch and our code for a batch that cannot be computed. Any other exception ends the loop.
_STEP_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, EngineError)

READER_S = 0.0002
"""Time for each reader of tokens that is woken. Under Serve one costs 60 to 90 us of the interpreter, which the steps
share: this leaves them more than half of it, however many readers there are."""
_LONG = 256
"""A step with more prompt tokens is long."""
MOST_FAILURES = 8
"""After this many failed steps in a row the device is considered lost, even if it still answers."""


class Launched(Protocol):
    """A launched step."""

    def wait(self) -> Drawn:
        """The tokens sampled for ``batch.sampling_chunks``.

        Waits for this step, but for nothing that was launched after it.
        """

    def scores(self) -> Sequence[Scores]:
        """The results for ``batch.scoring_chunks``; call it after :meth:`wait`."""


class StepRunner(Protocol):
    """Runs batches in the order of their launch."""

    def launch(self, batch: Batch) -> Launched:
        """Enqueue ``batch`` without waiting for the previous one, whose tokens replace ``DRAWN``.

        On a CPU it may be computed at once. After a launch that raised, the next batch has no ``DRAWN``.
        """

    def synchronize(self) -> None:
        """Wait until the device is idle. Raises RuntimeError when it is lost."""


@dataclass(frozen=True)
class _Step:
    """A batch in flight."""

    batch: Batch
    launched: Launched | Exception
    """The exception if the launch failed."""
    began: float


class StepLoop:
    """Schedules and runs steps and publishes their tokens; sleeps when there is nothing to do."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        metrics: EngineMetrics,
        publish: Callable[[News], None],
        ended: Callable[[], None],
        *,
        ahead: bool,
        threads: int | None,
    ) -> None:
        """``publish`` and ``ended`` (once, at the end of the loop) are called from the loop's thread.

        With ``ahead``, a step is scheduled and launched before waiting for the previous one.
        """
        self._scheduler = scheduler
        self._runner = runner
        self._metrics = metrics
        self._publish = publish
        self._ended = ended
        self._ahead = ahead
        self._threads = threads
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._step: _Step | None = None
        self._finished_at = 0.0
        self._told_at = 0.0
        self._failures = 0
        self._lost = False
        self._thread = threading.Thread(target=self._run, name="deltazip-step", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, request: GenerateRequest, slot: int) -> None:
        """Queue a request whose delta is in ``slot`` and stays there until the request's end is published."""
        self._inbox.put(lambda: self._add(request, slot))

    def abort(self, request_id: str) -> None:
        """End a request; its end (None) is published when no step uses it any more, unless it ended before."""
        self._inbox.put(lambda: self._scheduler.abort(request_id))

    def lend(self, blocks: range) -> None:
        """Add ``blocks`` to the cache, which nothing else uses until they are taken back."""
        self._inbox.put(lambda: self._scheduler.blocks.lend(blocks))

    def take_back(self, blocks: range, done: Callable[[], object]) -> None:
        """Remove ``blocks`` from the cache; ``done`` is called from the loop's thread when no step uses them."""
        self._inbox.put(lambda: self._take_back(blocks, done))

    def check(self, done: Callable[[DeltaZipError | None], None]) -> None:
        """Check the scheduler's invariants between two steps; ``done`` is called from the loop's thread."""
        self._inbox.put(lambda: done(self._check()))

    def stop(self) -> None:
        """End after the running step, and wait for that. Nothing is published for unfinished requests."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            while not self._lost and self._obey():
                self._advance()
            if self._step is not None and not self._lost:
                self._finish(self._step)
        finally:
            self._ended()

    def _obey(self) -> bool:
        """Execute queued commands, waiting for one if there is no other work; returns False to stop."""
        wait = not self._scheduler.has_work
        if wait:
            self._scheduler.check()
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _advance(self) -> None:
        """Launch the next step, then finish the previous one (and the next one too, unless ``ahead``).

        Most tokens are published in between: their readers need the GIL, while this thread only waits.
        """
        batch = self._scheduler.schedule()
        if _long(batch):
            self._tell(None)
        before, self._step = self._step, self._launch(batch)
        self._tell(None if before is not None and _long(before.batch) else self._turns())
        if before is not None:
            self._finish(before)
        if self._step is not None and (not self._ahead or isinstance(self._step.launched, Exception)):
            self._finish(self._step)
            self._step = None
        self._tell(self._turns() if self._step is None else 0)

    def _turns(self) -> int:
        """The number of readers to wake, by the time since the last ones."""
        now = time.perf_counter()
        turns = int((now - self._told_at) / READER_S)
        if turns:
            self._told_at = now
        return turns

    def _tell(self, turns: int | None) -> None:
        """Publish first tokens and ends, and the tokens of ``turns`` other readers; None: of all."""
        if news := self._scheduler.take_news(turns):
            self._publish(news)

    def _launch(self, batch: Batch) -> _Step | None:
        if not batch:
            return None
        began = time.perf_counter()
        try:
            return _Step(batch, self._runner.launch(batch), began)
        except _STEP_FAILURES as error:
            return _Step(batch, error, began)

    def _finish(self, step: _Step) -> None:
        """Wait for a step. If it failed, its requests fail; if the device is lost, the loop ends."""
        try:
            if isinstance(step.launched, Exception):
                raise step.launched
            drawn, scores = step.launched.wait(), step.launched.scores()
        except _STEP_FAILURES as error:
            logger.exception("a step of %d requests failed", len(step.batch.chunks))
            self._failures += 1
            self._lost = not self._device_works()
            if not self._lost:
                self._scheduler.fail(step.batch, EngineError(f"the step failed ({error!r}): send the request again"))
            return
        self._failures = 0
        self._scheduler.update(step.batch, drawn, scores)
        self._record(step)

    def _device_works(self) -> bool:
        """Whether the device still works: after some GPU errors all later calls of the process fail."""
        if self._failures == MOST_FAILURES:
            logger.critical(
                "%d steps in a row failed: the engine stops, so that its replica is replaced", MOST_FAILURES
            )
            return False
        try:
            self._runner.synchronize()
        except _STEP_FAILURES:
            logger.critical("the device is lost: the engine stops, so that its replica is replaced", exc_info=True)
            return False
        return True

    def _record(self, step: _Step) -> None:
        """Record metrics. As steps overlap, a step's time starts at the end of the previous one."""
        now = time.perf_counter()
        self._metrics.step_seconds.observe(now - max(step.began, self._finished_at))
        self._metrics.step_rows.observe(step.batch.num_tokens)
        self._metrics.step_versions.observe(step.batch.versions)
        self._finished_at = now

    def _add(self, request: GenerateRequest, slot: int) -> None:
        try:
            self._scheduler.add(request, slot)
        except DeltaZipError as error:
            self._publish([(request.request_id, error)])

    def _take_back(self, blocks: range, done: Callable[[], object]) -> None:
        step, self._step = self._step, None
        if step is not None:
            self._finish(step)
        if not self._lost:
            self._scheduler.take_back(blocks)
            done()

    def _check(self) -> DeltaZipError | None:
        # A load may have broken the device while no step was running.
        if self._step is None and not self._device_works():
            self._lost = True
            return EngineError("the device is lost: the engine stops, so that its replica is replaced")
        try:
            self._scheduler.check()
        except EngineError as error:
            return error
        return None


def _long(batch: Batch) -> bool:
    """Whether a step takes so long that all tokens are published before it."""
    return batch.num_tokens - len(batch.chunks) > _LONG
