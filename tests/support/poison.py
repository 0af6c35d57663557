"""Memory that is not a number before it is written, so that a step that reads it too early does not look right."""

from typing import Any

import pytest
import torch

from deltazip_ray.layers.targets import VectorTarget
from tests.support.engines import RunningEngine

_NAN = 255
"""In all bytes: NaN in every float type."""


def poison(run: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill a slot before each load, and a KV block whenever a sequence gets it."""
    assert run.engine._parts is not None
    core = run.engine._parts.core
    fill, take, blocks = core.slots._fill, core.scheduler.blocks._take, core.runner.attention.memory

    def fill_poisoned(slot: int, *arguments: Any) -> Any:
        core.slots.memory[slot] = _NAN
        for target in core.slots.targets.values():
            if isinstance(target, VectorTarget):
                target.table[slot + 1] = torch.nan
        if core.slots.memory.is_cuda:
            torch.cuda.current_stream().synchronize()  # the copies have a stream of their own
        return fill(slot, *arguments)

    def take_poisoned() -> int:
        block = take()
        blocks[block] = _NAN
        return block

    monkeypatch.setattr(core.slots, "_fill", fill_poisoned)
    monkeypatch.setattr(core.scheduler.blocks, "_take", take_poisoned)
