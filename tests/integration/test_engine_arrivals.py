"""A version that is used while it is on its way: on an idle engine the first step waits for each layer's weights."""

import asyncio
import threading

import pytest
from prometheus_client import CollectorRegistry

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.arrivals import layer_of
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.engine.device_slots import DeviceSlots
from deltazip_ray.errors import EngineStopped, StoreUnavailable
from deltazip_ray.residency.pace import Pace
from tests.support.engines import GREEDY, SETTINGS, RunningEngine, random_prompt, running
from tests.support.poison import poison
from tests.support.versions import MemorySource
from tests.support.waiting import until
from tests.support.zoo import Zoo

PROMPT = random_prompt(0, 12)


class Gate(Pace):
    """Lets ``open`` copies pass, and then those that come after ``release``."""

    def __init__(self, open_: int) -> None:
        super().__init__(None)
        self.open = open_
        self.go = threading.Event()
        self.reached = threading.Event()

    def take(self, size: int) -> None:
        self.open -= 1
        if self.open < 0:
            self.reached.set()
            assert self.go.wait(20)


def slots_of(engine: AsyncEngine) -> DeviceSlots:
    assert engine._parts is not None
    return engine._parts.core.slots


def gate(run: RunningEngine, open_: int = 1) -> Gate:
    """Copies of the engine stop after some."""
    made = slots_of(run.engine).uploads.copier._pace = Gate(open_)
    return made


async def test_a_step_begins_while_later_layers_are_copied(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    version = zoo.versions[0].version
    source = MemorySource(*zoo.versions)
    async with running(zoo.base, source, overlap_loads=True) as run:
        poison(run, monkeypatch)
        pace = gate(run)
        waiting = asyncio.create_task(run.generate(PROMPT, version))
        await until(lambda: pace.reached.is_set() and run.engine.stats().running == 1)
        assert version in run.engine.stats().resident
        assert source.held[version] == 1, "the copies read the host's bytes"
        await asyncio.sleep(0.05)  # enough for a step that does not wait
        pace.go.set()
        assert await waiting == zoo.oracles[version].greedy(PROMPT, GREEDY.max_tokens)
        assert not source.held[version]


async def test_steps_of_others_are_not_held_up(zoo: Zoo) -> None:
    """With a request that runs, a version is published when all of it is there."""
    cold = zoo.versions[0].version
    async with running(zoo.base, MemorySource(*zoo.versions), overlap_loads=True) as run:
        slots = slots_of(run.engine)
        slots.idle = lambda: False
        pace = gate(run)
        waiting = asyncio.create_task(run.generate(PROMPT, cold))
        await until(pace.reached.is_set)
        assert await run.generate(PROMPT) == zoo.oracles[None].greedy(PROMPT, GREEDY.max_tokens)
        assert cold not in run.engine.stats().resident
        pace.go.set()
        assert await waiting == zoo.oracles[cold].greedy(PROMPT, GREEDY.max_tokens)


async def test_a_slot_that_is_left_is_not_filled_again_before_its_copies_end(zoo: Zoo) -> None:
    first, second = (version.version for version in zoo.versions[:2])
    async with running(zoo.base, MemorySource(*zoo.versions), slots=1, overlap_loads=True) as run:
        pace = gate(run, 0)
        leaving = asyncio.create_task(run.generate(PROMPT, first))
        await until(lambda: pace.reached.is_set() and run.engine.stats().running == 1)
        leaving.cancel()
        other = asyncio.create_task(run.generate(PROMPT, second))
        await asyncio.sleep(0.05)
        pace.go.set()
        assert await other == zoo.oracles[second].greedy(PROMPT, GREEDY.max_tokens)


@pytest.mark.parametrize("count", [1, 2])
async def test_no_token_of_bytes_that_were_not_held(count: int, zoo: Zoo, caplog: pytest.LogCaptureFixture) -> None:
    """Holds were lost during the copies: whatever was computed is not told, and the engine ends, once."""

    class Forgetful(MemorySource):
        async def release(self, version: str) -> None:
            await super().release(version)
            raise StoreUnavailable("the node store took it for abandoned: load it again")

    engine = AsyncEngine(
        EngineConfig(**SETTINGS | {"overlap_loads": True}), zoo.base, Forgetful(*zoo.versions), CollectorRegistry()
    )
    await engine.start()
    slots_of(engine).idle = lambda: True
    run = RunningEngine(engine, CollectorRegistry())
    pace = gate(run)
    waiting = [asyncio.create_task(run.generate(PROMPT, version.version)) for version in zoo.versions[:count]]
    await until(lambda: pace.reached.is_set() and len(engine.stats().resident) == count)
    pace.go.set()
    for answer in waiting:
        with pytest.raises((StoreUnavailable, EngineStopped)):
            await answer
    with pytest.raises(EngineStopped):
        await run.generate(PROMPT)
    await engine.stop()
    assert "cannot be trusted" in caplog.text


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", 11),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.bias", 0),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight.added", None),
    ],
)
def test_layers_are_known_by_the_names_of_weights(weight: str, layer: int | None) -> None:
    assert layer_of(weight) == layer
