"""A scripted engine that keeps AsyncEngine's contract: deterministic tokens, cold and warm tiers, cancellation.

It computes nothing, so that tests of what is around the engine need neither weights nor seconds.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from deltazip_ray.config import CPU_KV_BLOCKS, AppConfig
from deltazip_ray.engine.async_engine import EngineStats
from deltazip_ray.errors import EngineStopped, InvalidRequest, Overloaded, PromptTooLong
from deltazip_ray.residency.tiers import DeltaSource, HostMemory, PrefetchTier, Tier
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk, TokenLogprobs

FATAL_SEED = 666
"""The seed of a request over which an engine ends, as when its device is lost; on another replica it goes on."""
_MUCH = (TokenLogprobs(-1.0, tuple((i % 60, -1.0 - i / 7) for i in range(2000)), 1),)
"""What is told of each token of a prompt: as many bytes as of a prompt that is a hundred times as long."""
FIRST_LETTER = 3  # in the vocabulary of tests.support.tiny: after <unk>, <bos>, <eos>


def scripted_token(version: str | None, prompt: tuple[int, ...], position: int, letters: int = 26) -> int:
    """The token at an output position: any replica says the same, and another version says something else."""
    seed = f"{version}|{prompt}|{position}".encode()
    return FIRST_LETTER + hashlib.blake2b(seed, digest_size=4).digest()[0] % letters


def scripted_tokens(version: str | None, prompt: tuple[int, ...], count: int) -> list[int]:
    """The first ``count`` output tokens."""
    return [scripted_token(version, prompt, position) for position in range(count)]


@dataclass(frozen=True)
class Script:
    """What the engine pretends. Pickles, so that it can travel to a replica."""

    base_digest: str = "b" * 64
    vocab_size: int = 84
    step_s: float = 0.0
    load_s: float = 0.0

    def __call__(self, config: AppConfig, source: DeltaSource, registry: CollectorRegistry) -> "FakeEngine":
        """An EngineFactory."""
        return FakeEngine(self, config, source, registry)


class FakeEngine:
    """See the module."""

    def __init__(self, script: Script, config: AppConfig, source: DeltaSource, registry: CollectorRegistry) -> None:
        self._script = script
        self._config = config.engine
        self._source = source
        self._resident: OrderedDict[str, None] = OrderedDict()
        self._loads: dict[str, asyncio.Task[Tier]] = {}
        self._running = 0
        self._open = False
        self._tokens = Counter("fake_engine_tokens", "Tokens made", registry=registry)
        Gauge("fake_engine_running", "Requests in the engine", registry=registry).set_function(lambda: self._running)

    @property
    def base_digest(self) -> str:
        return self._script.base_digest

    @property
    def max_model_len(self) -> int:
        return self._config.max_model_len

    async def start(self) -> None:
        self._open = True

    async def stop(self) -> None:
        self._open = False

    async def check(self) -> None:
        self._check_open()

    async def prefetch(self, version: str, tier: PrefetchTier = "device") -> bool:
        await self._make_resident(version)
        return True

    def retire(self, version: str) -> None:
        self._resident.pop(version, None)

    async def adopt(self, memory: HostMemory) -> None:
        self._check_open()

    def stats(self) -> EngineStats:
        return EngineStats(
            resident=frozenset(self._resident),
            loading=frozenset(self._loads),
            running=self._running,
            waiting=0,
            kv_blocks_free=CPU_KV_BLOCKS - self._running,
            kv_blocks=CPU_KV_BLOCKS,
            slots=self._config.slots,
            stopped=not self._open,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        self._check(request)
        self._running += 1
        try:
            tier: Tier | None = await self._make_resident(request.version)
            told = _MUCH * (len(request.prompt) - 1) if request.sampling.prompt_logprobs is not None else ()
            asked = request.prompt[: len(request.prompt) - request.output_offset]
            for position in range(request.output_offset, request.sampling.max_tokens):
                await asyncio.sleep(self._script.step_s)
                if request.sampling.seed == FATAL_SEED and not request.output_offset and position:
                    await self.stop()
                self._check_open()
                token = scripted_token(request.version, asked, position)
                if token in request.sampling.stop_token_ids and not request.sampling.ignore_eos:
                    yield TokenChunk((), "stop", tier)
                    return
                self._tokens.inc()
                last = position == request.sampling.max_tokens - 1
                yield TokenChunk((token,), "length" if last else None, tier, prompt_logprobs=told)
                tier, told = None, ()
        finally:
            self._running -= 1

    async def _make_resident(self, version: str | None) -> Tier:
        if version is None or version in self._resident:
            if version is not None:
                self._resident.move_to_end(version)
            return "device"
        if version not in self._loads:
            self._loads[version] = asyncio.create_task(self._load(version))
            self._loads[version].add_done_callback(lambda _: self._loads.pop(version))
        return await asyncio.shield(self._loads[version])

    async def _load(self, version: str) -> Tier:
        delta = await self._source.acquire(version)
        try:
            for blob in delta.manifest.blobs:
                if hashlib.sha256(delta.blobs[blob.block]).hexdigest() != blob.digest:
                    raise EngineStopped(f"the source gave other bytes than the manifest's for {blob.block}")
            await asyncio.sleep(self._script.load_s)
        finally:
            await self._source.release(version)
        self._resident[version] = None
        while len(self._resident) > self._config.slots:
            self._resident.popitem(last=False)
        return delta.tier

    def _check(self, request: GenerateRequest) -> None:
        self._check_open()
        if len(request.prompt) - request.output_offset + request.sampling.max_tokens > self._config.max_model_len:
            raise PromptTooLong("too long for the scripted engine")
        if max(request.prompt) >= self._script.vocab_size:
            raise InvalidRequest(f"token {max(request.prompt)} is not in the vocabulary")
        if self._running >= self._config.max_running + self._config.max_waiting:
            raise Overloaded("the scripted engine is full")

    def _check_open(self) -> None:
        if not self._open:
            raise EngineStopped("the scripted engine has stopped")
