"""The thread that steps: commands in, news out, and nothing of asyncio in it."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping

import torch

from deltazip_ray.engine.runner import ModelRunner
from deltazip_ray.errors import DeltaZipError, EngineError
from deltazip_ray.observability.engine_metrics import EngineMetrics
from deltazip_ray.scheduler.batch import Batch
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk
from deltazip_ray.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

News = Mapping[str, TokenChunk | DeltaZipError | None]
"""By request id: what it got, why it failed, or None when it was aborted and nothing of it is left."""

# What torch and the code around it raise for a batch that they cannot compute. Anything else ends the loop.
_STEP_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, EngineError)


class StepLoop:
    """Schedules, runs and publishes, one step after the other; sleeps when there is nothing to do."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        metrics: EngineMetrics,
        publish: Callable[[News], None],
        ended: Callable[[], None],
        threads: int | None,
    ) -> None:
        """``publish`` and ``ended`` (once, when the loop is over) are called from the loop's thread."""
        self._scheduler = scheduler
        self._runner = runner
        self._metrics = metrics
        self._publish = publish
        self._ended = ended
        self._threads = threads
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._news: dict[str, TokenChunk | DeltaZipError | None] = {}
        self._thread = threading.Thread(target=self._run, name="deltazip-step", daemon=True)

    def start(self) -> None:
        """Begin to take commands."""
        self._thread.start()

    def add(self, request: GenerateRequest, slot: int) -> None:
        """Queue a request whose delta is in ``slot`` and stays there until news say that the request is over."""
        self._inbox.put(lambda: self._add(request, slot))

    def abort(self, request_id: str) -> None:
        """Forget a request; news say None when no step uses it any more, or that it was over before."""
        self._inbox.put(lambda: self._abort(request_id))

    def check(self, done: Callable[[DeltaZipError | None], None]) -> None:
        """Check the scheduler's invariants between two steps; ``done`` is called from the loop's thread."""
        self._inbox.put(lambda: done(self._check()))

    def stop(self) -> None:
        """End after the running step, and wait for it. Requests that are left get no news."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            while self._obey():
                if self._scheduler.has_work:
                    self._step()
                if self._news:
                    self._publish(self._news)
                    self._news = {}
        finally:
            self._ended()

    def _obey(self) -> bool:
        """Carry out what was asked for, waiting for it if there is no other work; False: stop."""
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

    def _step(self) -> None:
        began = time.perf_counter()
        batch = self._scheduler.schedule()
        try:
            drawn = self._runner.run(batch)
        except _STEP_FAILURES as error:
            logger.exception("a step of %d requests failed", len(batch.chunks))
            for chunk in batch.chunks:
                self._fail(chunk.request_id, f"the step failed ({error!r}): send the request again")
            return
        for chunk, token in zip(batch.sampling_chunks, drawn, strict=True):
            if token is None:
                self._fail(chunk.request_id, "the logits are not finite: the version is broken")
        # The scheduler drops tokens of requests that are gone, so those that failed may have any.
        self._news |= self._scheduler.update(batch, [0 if token is None else token for token in drawn])
        self._record(batch, time.perf_counter() - began)

    def _record(self, batch: Batch, seconds: float) -> None:
        self._metrics.step_seconds.observe(seconds)
        self._metrics.step_rows.observe(batch.num_tokens)
        self._metrics.step_versions.observe(len({chunk.slot for chunk in batch.chunks}))

    def _fail(self, request_id: str, message: str) -> None:
        self._scheduler.abort(request_id)
        self._news[request_id] = EngineError(message)

    def _add(self, request: GenerateRequest, slot: int) -> None:
        try:
            self._scheduler.add(request, slot)
        except DeltaZipError as error:
            self._news[request.request_id] = error

    def _abort(self, request_id: str) -> None:
        if self._scheduler.abort(request_id):
            self._news[request_id] = None

    def _check(self) -> DeltaZipError | None:
        try:
            self._scheduler.check()
        except EngineError as error:
            return error
        return None
