"""The engine's asyncio interface: an async generator per request, and one step loop for all of them."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.active_requests import ActiveRequests
from deltazip_ray.engine.core import EngineCore, build_core
from deltazip_ray.engine.entrance import Entrance, MakeMatcher
from deltazip_ray.engine.split import Split
from deltazip_ray.engine.step_loop import StepLoop
from deltazip_ray.engine.versions import Versions
from deltazip_ray.errors import DeltaZipError, EngineError, EngineStopped
from deltazip_ray.observability.engine_metrics import EngineMetrics, EngineStats
from deltazip_ray.residency.tiers import DeltaSource, HostMemory, PrefetchTier
from deltazip_ray.scheduler.outbox import News
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk

__all__ = ["AsyncEngine", "EngineStats"]

logger = logging.getLogger(__name__)

_STOPPED = "the engine has stopped: send the request to another replica"


@dataclass(frozen=True)
class _Running:
    """The parts that exist between start and stop."""

    core: EngineCore
    versions: Versions
    entrance: Entrance
    requests: ActiveRequests
    steps: StepLoop


class AsyncEngine:
    """Generates tokens for the base and for all versions that ``source`` has. Belongs to one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        base: Path,
        source: DeltaSource,
        registry: CollectorRegistry,
        *,
        make_matcher: MakeMatcher | None = None,
        build: Callable[[EngineConfig, Path], EngineCore] = build_core,
    ) -> None:
        """``base`` is the folder of the base checkpoint, which ``build`` reads in :meth:`start`.

        Without ``make_matcher`` requests for structured output are rejected.
        """
        self._make_matcher = make_matcher
        self._build = build
        self._config = config
        self._base = base
        self._source = source
        self._metrics = EngineMetrics(registry, self.stats)
        self._parts: _Running | None = None
        self._stopped = False
        self._stopping: asyncio.Task[None] | None = None
        self._splitting: asyncio.Task[None] | None = None
        self._verdicts: set[asyncio.Future[DeltaZipError | None]] = set()

    async def start(self) -> None:
        """Load the base and start the step loop; a second call does nothing.

        Raises ConfigError, CheckpointInvalid, and EngineStopped if it was stopped meanwhile.
        """
        if self._parts is not None:
            return
        core = await asyncio.to_thread(self._build, self._config, self._base)
        if self._stopped:
            raise EngineStopped(_STOPPED)
        logger.info("the engine started in %s", core.start)
        for stage, spent in core.start.seconds.items():
            self._metrics.start_seconds.labels(stage).set(spent)
        here = asyncio.get_running_loop()
        steps = StepLoop(
            core.scheduler,
            core.runner,
            self._metrics,
            publish=functools.partial(_call_soon, here, self._deliver),
            ended=functools.partial(_call_soon, here, self._end),
            ahead=self._config.device == "cuda" if self._config.async_steps is None else self._config.async_steps,
            threads=self._config.threads,
        )
        slots, half_life = self._config.slots, self._config.eviction_half_life
        versions = Versions(self._source, core.slots, slots, self._metrics, half_life, self._begin_to_stop)
        requests = ActiveRequests(versions.table.unpin)
        entrance = Entrance(self._config, core, versions, requests, self._make_matcher)
        self._parts = _Running(core, versions, entrance, requests, steps)
        steps.start()
        if self._config.slots_min is not None:
            split = Split(versions, core.scheduler, steps, core.slot_blocks, self._config.slots_min)
            self._splitting = asyncio.create_task(split.run())

    async def stop(self) -> None:
        """Stop after the running step; unfinished requests get EngineStopped. A second call waits for the first."""
        await asyncio.shield(self._begin_to_stop())

    async def adopt(self, memory: HostMemory) -> None:
        """Prepare for loads from ``memory`` now rather than at the first load. Raises EngineStopped."""
        await asyncio.to_thread(self._open().core.slots.uploads.lock_pages, memory)

    async def prefetch(self, version: str, tier: PrefetchTier = "device") -> bool:
        """Bring a version to ``tier`` because it will be needed soon, if that delays nothing else.

        Returns whether it is there; hints are dropped without an error. Raises EngineStopped.
        """
        return await self._open().versions.prefetch(version, tier, self._config.load_timeout_s)

    def retire(self, version: str) -> None:
        """Free a version's slot as soon as no request uses it. Raises EngineStopped."""
        self._open().versions.table.discard(version)

    async def unload(self, version: str, *, disk: bool = False) -> None:
        """Remove a version from its slot, the host and, with ``disk``, the disk, as soon as nothing uses it.

        Raises EngineStopped, ArtifactError, StoreError.
        """
        await self._open().versions.unload(version, disk=disk)

    @property
    def base_digest(self) -> str:
        """Digest of the base checkpoint."""
        return self._started().core.base.digest

    @property
    def vocab_size(self) -> int:
        """Size of the base's vocabulary; versions may add tokens."""
        return self._started().core.base.vocab_size

    @property
    def max_model_len(self) -> int:
        """Maximum tokens of one sequence, prompt plus output."""
        return self._started().core.max_model_len

    def stats(self) -> EngineStats:
        """A snapshot, to be taken in the engine's event loop. Zeros before the start."""
        if self._parts is None:
            return EngineStats(frozenset(), frozenset(), 0, 0, 0, 0, self._config.slots)
        table, scheduler = self._parts.versions.table, self._parts.core.scheduler
        return EngineStats(
            resident=table.resident,
            loading=table.loading,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting + self._parts.entrance.inside,
            kv_blocks=scheduler.blocks.num_blocks,
            kv_blocks_free=scheduler.blocks.free_blocks,
            slots=table.slots,
            evictions=table.evictions,
            preemptions=scheduler.preemptions,
            prefix_lookups=scheduler.admission.prefix_lookups,
            prefix_hits=scheduler.admission.prefix_hits,
            stopped=self._stopped,
        )

    async def check(self) -> None:
        """Check that blocks, slots and pins are consistent. Raises EngineError if not, EngineStopped."""
        parts = self._open()
        parts.versions.table.check()
        if self._splitting is not None and self._splitting.done():
            raise EngineError("slots that are lent no longer come back; restart the replica and report this") from (
                self._splitting.exception()
            )
        here = asyncio.get_running_loop()
        verdict: asyncio.Future[DeltaZipError | None] = here.create_future()
        self._verdicts.add(verdict)
        parts.steps.check(functools.partial(_call_soon, here, _settle, verdict))
        try:
            error = await verdict
        finally:
            self._verdicts.discard(verdict)
        if error is not None:
            raise error

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """The tokens of one request as they are sampled; the last chunk has a finish reason.

        Cancellation or ``aclose`` ends the request and frees its resources. Raises InvalidRequest, PromptTooLong,
        Overloaded, ArtifactError, StoreError, LoadTimeout, EngineError, EngineStopped.
        """
        arrived = time.perf_counter()
        outcome = "aborted"
        try:
            parts = self._open()
            parts.entrance.check(request)
            async with contextlib.aclosing(self._run(request, parts, arrived)) as chunks:
                async for chunk in chunks:
                    outcome = chunk.finish_reason or outcome
                    yield chunk
        except DeltaZipError as error:
            outcome = type(error).__name__
            raise
        finally:
            self._metrics.requests.labels(outcome).inc()

    async def _run(self, request: GenerateRequest, parts: _Running, arrived: float) -> AsyncGenerator[TokenChunk, None]:
        matcher, pin = await parts.entrance.enter(request)
        try:
            self._open()  # it may have stopped meanwhile
        except EngineStopped:
            parts.entrance.leave(pin)
            raise
        key, stream = parts.requests.add(request.request_id, pin)
        parts.steps.add(dataclasses.replace(request, request_id=key, matcher=matcher), -1 if pin is None else pin.slot)
        self._metrics.prompt_tokens.inc(len(request.prompt))
        tier = "device" if pin is None else pin.tier
        try:
            chunk = await stream.get()
            if pin is not None:
                await parts.versions.confirm(pin)
            self._metrics.first_token_seconds.labels(tier).observe(time.perf_counter() - arrived)
            chunk = chunk._replace(tier=tier)
            while True:
                yield chunk
                if chunk.finish_reason is not None:
                    return
                chunk = await stream.get()
        finally:
            if key in parts.requests:
                parts.steps.abort(key)

    def _deliver(self, news: News) -> None:
        """Deliver the results of a step, on the event loop."""
        self._metrics.output_tokens.inc(self._started().requests.deliver(news))

    def _begin_to_stop(self) -> asyncio.Task[None]:
        """Accept no more requests, and start to end the others, once."""
        self._stopped = True
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        return self._stopping

    async def _stop(self) -> None:
        if self._parts is not None:
            await self._parts.versions.close()
            closing = asyncio.to_thread(self._parts.core.slots.warm_up.close)
            await asyncio.gather(asyncio.to_thread(self._parts.steps.stop), closing)
            self._end()

    def _end(self) -> None:
        """The step loop has ended, on purpose or not: fail everything that waits for it."""
        self._stopped = True
        if self._splitting is not None:
            self._splitting.cancel()
        self._started().requests.fail(EngineStopped(_STOPPED))
        for verdict in self._verdicts:
            _settle(verdict, EngineStopped(_STOPPED))

    def _started(self) -> _Running:
        if self._parts is None:
            raise EngineStopped("the engine has not started: call start() first")
        return self._parts

    def _open(self) -> _Running:
        parts = self._started()
        if self._stopped:
            raise EngineStopped(_STOPPED)
        return parts


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    """Call ``callback`` on the event loop, from any thread."""
    loop.call_soon_threadsafe(callback, *args)


def _settle(verdict: asyncio.Future[DeltaZipError | None], error: DeltaZipError | None) -> None:
    """Set the result of a check, if it is still awaited."""
    if not verdict.done():
        verdict.set_result(error)
