"""Open-loop replay: every request starts when the trace says, whatever became of those before it."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

from deltazip_loadgen.client import Exchange
from deltazip_loadgen.connections import Connections
from deltazip_loadgen.options import ReplayOptions, api_root
from deltazip_loadgen.record import Record
from deltazip_loadgen.trace import TraceRequest


@dataclass(frozen=True)
class Event:
    """Something that happened to a request, for progress displays and for writing records as they come."""

    kind: Literal["sent", "first_token", "finished"]
    model: str
    record: Record | None = None


OnEvent = Callable[[Event], None]


async def replay(
    trace: Iterable[TraceRequest],
    url: str,
    *,
    options: ReplayOptions | None = None,
    api_key: str | None = None,
    on_event: OnEvent | None = None,
    stop: asyncio.Event | None = None,
) -> list[Record]:
    """Send the requests of ``trace`` to the OpenAI-compatible server at ``url``; records in the order of the trace.

    A request that fails becomes a record with its outcome, never an exception. Setting ``stop`` ends the replay
    early: nothing more is sent, what is under way is recorded as aborted. Requests that were still waiting for
    their turn under ``max_concurrency`` were never sent and have no record. Errors of a lazily read trace pass through.
    """
    options = options or ReplayOptions()
    async with Connections(api_root(url), options, api_key) as connections:
        run = _Run(connections, options, on_event or (lambda event: None), stop or asyncio.Event())
        await run.play(trace)
    return sorted(run.records, key=lambda record: record.index)


class _Run:
    """The state of one replay."""

    def __init__(
        self, connections: Connections, options: ReplayOptions, on_event: OnEvent, stop: asyncio.Event
    ) -> None:
        self.records: list[Record] = []
        self._connections = connections
        self._options = options
        self._on_event = on_event
        self._stop = stop
        self._limit: AbstractAsyncContextManager[None] = (
            asyncio.Semaphore(options.max_concurrency) if options.max_concurrency else nullcontext()
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._zero_s = self._loop.time()

    async def play(self, trace: Iterable[TraceRequest]) -> None:
        watcher = asyncio.create_task(self._cancel_on_stop())
        try:
            async with asyncio.TaskGroup() as group:
                self._keep(group.create_task(self._dispatch(trace, group)))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            watcher.cancel()

    def _clock(self) -> float:
        return self._loop.time() - self._zero_s

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel_on_stop(self) -> None:
        await self._stop.wait()
        for task in tuple(self._tasks):
            task.cancel()

    async def _dispatch(self, trace: Iterable[TraceRequest], group: asyncio.TaskGroup) -> None:
        """Start each request at its time. Sleeps at least once a request, so that started ones get to send."""
        for index, request in enumerate(trace):
            intended_s = request.at_s / self._options.speed
            if self._options.duration_s is not None and intended_s > self._options.duration_s:
                return
            await asyncio.sleep(max(0.0, intended_s - self._clock()))
            first_token = partial(self._on_event, Event("first_token", request.model))
            exchange = Exchange(request, index, intended_s, self._options, self._clock, first_token)
            self._keep(group.create_task(self._one(exchange, request.model)))

    async def _one(self, exchange: Exchange, model: str) -> None:
        async with self._limit:
            self._on_event(Event("sent", model))
            try:
                record = await exchange.run(self._connections)
            except asyncio.CancelledError:
                if not self._stop.is_set():
                    raise
                record = exchange.aborted()
        self.records.append(record)
        self._on_event(Event("finished", model, record))
