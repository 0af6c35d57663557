"""The start of an engine: what it reports, and what is compiled before anybody waits for it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine import codec_warm_up
from deltazip_ray.engine.core import EngineCore, build_core
from deltazip_ray.engine.start_up import keep_kernels
from deltazip_ray.layers import warm_up
from deltazip_ray.layers.targets import MatrixTarget
from deltazip_ray.layers.triton_ops import TritonStack
from deltazip_ray.layers.warm_up import launch_all
from tests.integration.test_engine_logits import load
from tests.support.engines import GREEDY, SETTINGS, random_prompt, running
from tests.support.versions import MemorySource
from tests.support.zoo import Zoo


async def test_a_warmed_engine_reports_its_start_and_answers_as_any(zoo: Zoo) -> None:
    prompt = random_prompt(0, 12)
    async with running(zoo.base, MemorySource(*zoo.versions), warm_up=True) as run:
        stages = ("digest", "attention", "base", "slots", "KV cache", "warm-up", "graphs", "codecs")
        assert all(run.metric("start_seconds", stage=stage) > 0 for stage in stages)
        assert run.engine.stats().kv_blocks_free == SETTINGS["kv_blocks"]
        assert run.metric("step_seconds_count") == 0, "nobody asked for those steps"
        for name in zoo.names[:2]:
            assert await run.generate(prompt, name) == zoo.oracles[name].greedy(prompt, GREEDY.max_tokens)


@pytest.mark.parametrize("settings", [{"max_batch_tokens": 1}, {"max_running": 1}, {"max_model_len": 3}])
async def test_any_limits_can_be_warmed_up(zoo: Zoo, settings: dict[str, Any]) -> None:
    async with running(zoo.base, MemorySource(), warm_up=True, **settings) as run:
        assert run.metric("start_seconds", stage="warm-up") > 0


@pytest.fixture
def core(zoo: Zoo) -> EngineCore:
    return build_core(EngineConfig(**SETTINGS, device="cpu", kernels="triton"), zoo.base)


def stack_of(core: EngineCore, name: str) -> TritonStack:
    target = core.slots.targets[name]
    assert isinstance(target, MatrixTarget)
    assert isinstance(target.stack, TritonStack)
    return target.stack


def test_kernels_of_a_codec_are_compiled_before_steps_see_it(
    core: EngineCore, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each shape, for what comes beside what is there already, and in the thread that loads."""
    mlp, attention = (stack_of(core, f"model.layers.0.{part}.weight") for part in ("mlp.down_proj", "self_attn.o_proj"))
    compiled: list[tuple[tuple[tuple[int, int], ...], tuple[str, ...]]] = []

    def compile_stack(stack: TritonStack, codecs: tuple[str, ...], rank: int, *, looked_up: bool) -> None:
        assert stack.codecs != codecs, "a step that is launched now must not need it yet"
        compiled.append((stack.shapes, codecs))

    monkeypatch.setattr(codec_warm_up, "warm_stack", compile_stack)
    first, second, _, odd = zoo.versions
    load(core, 0, first)
    assert compiled.count((mlp.shapes, ("int4",))) == 1, "the other layer has the same shape"
    assert mlp.codecs == attention.codecs == ("int4",)
    generation, before = mlp.ops.generation, len(compiled)
    load(core, 1, first)
    assert (mlp.ops.generation, len(compiled)) == (generation, before), "nothing is new"
    load(core, 2, odd)
    assert (mlp.shapes, ("int4", "int2")) in compiled
    assert "raw" in stack_of(core, "model.layers.1.self_attn.o_proj.weight").codecs
    load(core, 3, second)
    assert compiled[-1] != (mlp.shapes, ("int2",)), "steps serve all that there are together"


def test_codecs_of_the_settings_are_compiled_and_seen_by_no_step(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: set[tuple[object, tuple[str, ...]]] = set()
    monkeypatch.setattr(
        codec_warm_up, "warm_stack", lambda stack, codecs, rank, looked_up: compiled.add((stack.shapes, codecs))
    )
    core.slots.warm_up.codecs(("int4", "int2"))
    stack = stack_of(core, "model.layers.0.mlp.down_proj.weight")
    assert {(stack.shapes, ("int4",)), (stack.shapes, ("int2",))} <= compiled
    assert stack.codecs == ()


def test_every_launch_of_a_codec_finds_nothing_to_do(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "_BATCHES", ((1, 1, 1), (18, 2, 18)))  # the interpreter is slow
    stack = stack_of(core, "model.embed_tokens.weight")
    with torch.inference_mode():
        launch_all(stack, ("int4", "raw", "low_rank"), 16, looked_up=True)
    assert stack.codecs == ()
    assert not stack.table.entries.any()


def test_compiled_kernels_are_kept_where_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", "before")
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "before")
    keep_kernels(None)
    assert (triton.knobs.cache.dir, os.environ["FLASHINFER_WORKSPACE_BASE"]) == ("before", "before")
    keep_kernels(tmp_path)
    assert triton.knobs.cache.dir == str(tmp_path / "triton")
    assert os.environ["FLASHINFER_WORKSPACE_BASE"] == str(tmp_path)
