"""How a GPU's memory is shared out."""

from dataclasses import replace

import pytest

from benchmarks.engine_model import decoder_shape
from deltazip_kernels.merged import MERGE_ROWS
from deltazip_ray.config import GIB, EngineConfig
from deltazip_ray.engine.memory import DeviceMemory, MemoryPlan, plan_memory, workspace_bytes
from deltazip_ray.errors import ConfigError

LOADED = DeviceMemory(total=100 * GIB, free=84 * GIB, own=16 * GIB)


def plan(memory: DeviceMemory, fraction: float, kv_blocks: int | None = None) -> MemoryPlan:
    config = EngineConfig(memory_fraction=fraction, kv_blocks=kv_blocks)
    return plan_memory(config, memory, base=16 * GIB, slots=4 * GIB, workspace=5 * GIB, block_bytes=GIB)


def test_the_cache_takes_what_the_rest_leaves_of_the_fraction() -> None:
    found = plan(LOADED, 0.9)
    assert found.blocks == 90 - 16 - 4 - 5 - 1  # one block is for rows that pad a batch
    assert "KV cache: 64 blocks, 1024 tokens" in str(found)


def test_two_engines_share_a_gpu_evenly() -> None:
    first = plan(LOADED, 0.48)
    beside = replace(LOADED, free=LOADED.free - 48 * GIB)
    assert plan(beside, 0.48) == first


def test_what_others_have_taken_is_not_planned_with() -> None:
    assert plan(replace(LOADED, free=40 * GIB), 0.9).blocks == 40 - 4 - 5 - 1


@pytest.mark.parametrize("kv_blocks", [None, 60])
def test_what_does_not_fit_is_refused_with_the_table(kv_blocks: int | None) -> None:
    with pytest.raises(ConfigError, match=r"free:\n  base +16\.00 GiB"):
        plan(LOADED, 0.3 if kv_blocks is None else 0.8, kv_blocks)


def test_the_workspace_has_room_for_a_merged_head_once_so_many_requests_of_one_version_can_sample() -> None:
    shape = decoder_shape("8b")
    before, after = (
        workspace_bytes(EngineConfig(max_running=count, max_added_tokens=0), shape, 2)
        for count in (MERGE_ROWS - 1, MERGE_ROWS)
    )
    head, gate_up = (shape.hidden_size * rows * 2 for rows in (shape.vocab_size, 2 * shape.intermediate_size))
    assert after - before >= head - gate_up
