"""Loads, hints, evictions, pins, unloads, lent slots, cancellations, damage, repair: in any order, against one host.

Hypothesis looks for an order that breaks an invariant: no slot and no room of the arena leaks, no byte is used that
was not verified, everybody who waits is answered. ``DELTAZIP_CHAOS_EXAMPLES`` sets how many orders are tried.
"""

import asyncio
import os
import random
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from deltazip_ray.residency.arena import ALIGNMENT
from tests.support.chaos_host import LOAD_TIMEOUT_S, Blobs, ChaosHost, Client, LoopDriver
from tests.support.faulty_store import Fault, Kind

LONG = "DELTAZIP_CHAOS_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("DELTAZIP_CHAOS_EXAMPLES", "40"))
KINDS: tuple[Kind, ...] = ("unavailable", "wrong bytes", "truncated", "absent")
POOL = tuple(bytes([65 + i]) * (i % 3 * ALIGNMENT + 100 * i + 1) for i in range(10))
"""Blobs of one to three pages, which versions share."""


PAUSES = st.sampled_from([0.0, 0.002, 0.005, 0.02])


class Host(RuleBasedStateMachine):
    """Rules are what may happen to a host; between them the event loop runs for a moment."""

    versions = Bundle("versions")
    clients = Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="dz-chaos-"))
        self.loop = LoopDriver()
        self.host: ChaosHost = self.loop.run(ChaosHost, self.folder)
        self.host.forgotten = self.loop.forgotten

    @initialize(target=versions, seed=st.integers(0, 1 << 16))
    def publish_some(self, seed: int) -> object:
        rng = random.Random(seed)
        chosen = [rng.sample(range(len(POOL)), rng.randint(1, 4)) for _ in range(5)]
        return multiple(*(self.host.publish(_blobs(blobs)) for blobs in chosen))

    @rule(target=versions, blobs=st.lists(st.sampled_from(range(len(POOL))), min_size=1, max_size=4, unique=True))
    def publish(self, blobs: list[int]) -> str:
        return self.host.publish(_blobs(blobs))

    @rule(target=clients, wanted=st.lists(versions, min_size=1, max_size=6), pause_s=PAUSES, go=st.booleans())
    def ask(self, wanted: list[str], pause_s: float, go: bool) -> object:
        """Requests of which each is done as soon as it can be, or holds its version until it is told to go."""
        found = [self.loop.run(self.host.ask, version, LOAD_TIMEOUT_S) for version in wanted]
        for client in found if go else ():
            self.loop.run(client.may_go.set)
        self.loop.run(asyncio.sleep, pause_s)
        return multiple(*found)

    @rule(target=clients, version=versions, timeout_s=st.sampled_from([0.0, 0.002]))
    def ask_in_a_hurry(self, version: str, timeout_s: float) -> Client:
        return self.loop.run(self.host.ask, version, timeout_s)  # type: ignore[no-any-return]

    @rule(client=clients)
    def finish(self, client: Client) -> None:
        self.loop.run(client.may_go.set)

    @rule(client=clients)
    def cancel(self, client: Client) -> None:
        self.loop.run(client.task.cancel)

    @rule(pause_s=PAUSES)
    def let_run(self, pause_s: float) -> None:
        self.loop.run(asyncio.sleep, pause_s)

    @rule(kind=st.sampled_from(KINDS), where=st.sampled_from(["/blobs/", "/versions/", ""]), times=st.integers(1, 6))
    def go_wrong(self, kind: Kind, where: str, times: int) -> None:
        self.host.store.faults.append(Fault(kind, where, times))

    @rule()
    def go_right(self) -> None:
        self.host.store.faults.clear()

    @rule(stalls=st.booleans())
    def stall(self, stalls: bool) -> None:
        (self.host.store.gate.clear if stalls else self.host.store.gate.set)()

    @rule(version=versions, block=st.integers(0, 3))
    def corrupt(self, version: str, block: int) -> None:
        self.host.corrupt(version, block)

    @rule(version=versions)
    def unpublish(self, version: str) -> None:
        self.host.unpublish(version)

    @rule(version=versions)
    def repair(self, version: str) -> None:
        self.host.repair(version)

    @rule(index=st.integers(0, 20), how=st.sampled_from(["gone", "short", "wrong", "wrong", "folder gone"]))
    def damage_disk(self, index: int, how: str) -> None:
        self.host.damage_disk(index, how)

    @rule(seconds=st.sampled_from([0.01, 1.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.host.later_s += seconds

    @rule(version=versions, device=st.booleans())
    def hint(self, version: str, device: bool) -> None:
        self.loop.run(partial(self.host.hint, version, device=device))

    @rule(version=versions, disk=st.booleans())
    def unload(self, version: str, disk: bool) -> None:
        self.loop.run(partial(self.host.unload, version, disk=disk))

    @rule(back=st.booleans())
    def lend(self, back: bool) -> None:
        self.loop.run(self.host.take_back if back else self.host.lend)

    @rule()
    def restart(self) -> None:
        self.loop.run(self.host.restart_cache)

    @invariant()
    def all_adds_up(self) -> None:
        self.loop.run(self.host.check)

    def teardown(self) -> None:
        try:
            self.loop.run(self.host.settle)
        finally:
            self.loop.close()
            shutil.rmtree(self.folder, ignore_errors=True)


def _blobs(chosen: list[int]) -> Blobs:
    return {f"layers.{i}": POOL[index] for i, index in enumerate(chosen)}


Host.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=80,
    deadline=None,
    # What is found is told at once; a long run takes its time to make it small.
    phases=tuple(phase for phase in Phase if LONG or phase not in (Phase.shrink, Phase.explain)),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@pytest.mark.timeout(0 if LONG else 300)
class TestHost(Host.TestCase):  # type: ignore[misc,name-defined]
    """Run by pytest."""
