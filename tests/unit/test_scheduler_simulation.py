"""The simulated load of ``benchmarks.scheduling``: every policy answers everybody."""

import asyncio
import json
import random
from pathlib import Path

import pytest

from benchmarks.scheduling import CONFIG, FRONTS, host, host_table, poisson, request, table
from benchmarks.scheduling_fronts import Costs, World

ROOT = Path(__file__).parents[2]


def play(front: str, slots: int = 3) -> World:
    world = World(CONFIG, Costs(), poisson(60, 20.0, [1.0] * 8, seed=1))
    asyncio.run(world.run(FRONTS[front](world, slots)))
    world.sched.check()
    return world


@pytest.mark.parametrize("front", list(FRONTS))
def test_everybody_is_answered_in_full_when_more_versions_wait_than_slots_exist(front: str) -> None:
    world = play(front)
    assert world.loads > 8
    for name, one in world.served.items():
        assert one.first is not None
        assert one.ended is not None
        assert one.arrived < one.first <= one.ended
        assert world.output[name] == one.request.sampling.max_tokens


def test_the_host_time_is_of_steps_with_everybody_in_them() -> None:
    assert host(8, steps=3)["us"] > 0


def test_requests_do_not_begin_alike() -> None:
    dice = random.Random(0)
    first, second = request(dice, 0, 0), request(dice, 1, 0)
    assert first.prompt[0] != second.prompt[0]


def test_the_page_shows_the_results() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "scheduling.json").read_text())
    page = (ROOT / "docs" / "scheduling.md").read_text()
    assert host_table(report) in page
    assert table(report) in page
