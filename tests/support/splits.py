"""Splits of memory that move all the time."""

from typing import Any

import pytest

from deltazip_ray.engine import split
from deltazip_ray.engine.step_loop import StepLoop


def make_restless(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """Have slots lent and taken back at once, their memory full of NaN. Returns the blocks that were lent, so far."""
    for name, seconds in (("LOOK_S", 0.001), ("SHORT_S", 0.004), ("CALM_S", 0.02)):
        monkeypatch.setattr(split, name, seconds)
    lent: list[range] = []
    lend = StepLoop.lend

    def lend_rubbish(loop: StepLoop, blocks: range) -> None:
        runner: Any = loop._runner
        runner.attention.memory[blocks.start : blocks.stop] = 255
        lent.append(blocks)
        lend(loop, blocks)

    monkeypatch.setattr(StepLoop, "lend", lend_rubbish)
    return lent
