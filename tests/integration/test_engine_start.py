"""The start of an engine: what it reports, and what is compiled before anybody waits for it."""

import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from deltazip_kernels import Segments, gather, merged, plan, quantize, skinny, triton_backend
from deltazip_kernels.plan import MORE, SOME
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine import codec_warm_up
from deltazip_ray.engine.codec_warm_up import Later
from deltazip_ray.engine.core import EngineCore, build_core
from deltazip_ray.engine.start_up import keep_kernels
from deltazip_ray.layers.activations import Activations
from deltazip_ray.layers.rows import Rows
from deltazip_ray.layers.targets import MatrixTarget
from deltazip_ray.layers.triton_ops import TritonOps, TritonStack
from deltazip_ray.layers.warm_up import launch_all
from tests.integration.test_engine_logits import load
from tests.support.engines import GREEDY, SETTINGS, random_prompt, running
from tests.support.versions import MemorySource
from tests.support.waiting import until
from tests.support.zoo import Zoo


async def test_a_warmed_engine_reports_its_start_and_answers_as_any(zoo: Zoo) -> None:
    prompt = random_prompt(0, 12)
    async with running(zoo.base, MemorySource(*zoo.versions), warm_up=True) as run:
        stages = ("digest", "attention", "base", "slots and KV cache", "warm-up", "graphs", "codecs")
        assert all(run.metric("start_seconds", stage=stage) > 0 for stage in stages)
        assert run.engine.stats().kv_blocks_free == SETTINGS["kv_blocks"]
        assert run.metric("step_seconds_count") == 0, "nobody asked for those steps"
        for name in zoo.names[:2]:
            assert await run.generate(prompt, name) == zoo.oracles[name].greedy(prompt, GREEDY.max_tokens)


@pytest.mark.parametrize("settings", [{"max_batch_tokens": 1}, {"max_running": 1}, {"max_model_len": 3}])
async def test_any_limits_can_be_warmed_up(zoo: Zoo, settings: dict[str, Any]) -> None:
    async with running(zoo.base, MemorySource(), warm_up=True, **settings) as run:
        assert run.metric("start_seconds", stage="warm-up") > 0


def test_no_sequence_may_be_longer_than_the_kv_cache(zoo: Zoo) -> None:
    """Routers give a chat without a limit all of the context: such chats were refused."""
    for blocks, longest in ((3, 3 * 4), (1000, 64)):
        config = EngineConfig(**SETTINGS | {"kv_blocks": blocks, "block_size": 4, "max_model_len": 64})
        assert build_core(config, zoo.base).max_model_len == longest


@pytest.fixture
def core(zoo: Zoo) -> EngineCore:
    return build_core(EngineConfig(**SETTINGS, device="cpu", kernels="triton"), zoo.base)


def stack_of(core: EngineCore, name: str) -> TritonStack:
    target = core.slots.targets[name]
    assert isinstance(target, MatrixTarget)
    assert isinstance(target.stack, TritonStack)
    return target.stack


async def test_kernels_of_a_codec_are_compiled_before_steps_see_it(
    core: EngineCore, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is new, once for each shape, in the thread that loads; one launch for all codecs afterwards."""
    mlp, attention = (stack_of(core, f"model.layers.0.{part}.weight") for part in ("mlp.down_proj", "self_attn.o_proj"))
    compiled: list[tuple[tuple[tuple[int, int], ...], tuple[str, ...]]] = []

    def launch_all(stack: TritonStack, codecs: tuple[str, ...], *_: object, looked_up: bool) -> None:
        assert codecs not in stack.groups, "a step that is launched now must not need it yet"
        compiled.append((stack.shapes, codecs))

    monkeypatch.setattr(codec_warm_up, "launch_all", launch_all)
    first, second, _, odd = zoo.versions
    load(core, 0, first)
    assert compiled.count((mlp.shapes, ("int4",))) == 1, "the other layer has the same shape"
    assert {*mlp.groups, *attention.groups} == {("int4",)}
    generation, before = mlp.ops.generation, len(compiled)
    load(core, 1, first)
    assert (mlp.ops.generation, len(compiled)) == (generation, before), "nothing is new"
    load(core, 2, odd)
    assert "raw" in stack_of(core, "model.layers.1.self_attn.o_proj.weight").codecs
    load(core, 3, second)
    await until(lambda: len(mlp.groups) == 1)
    assert compiled.count((mlp.shapes, ("int2",))) == 1
    assert mlp.groups == (("int4", "int2"),), "one launch serves them"
    assert (mlp.shapes, ("int4", "int2")) in compiled


def test_codecs_of_the_settings_are_ready_for_steps_before_a_version_comes(
    core: EngineCore, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: set[tuple[object, tuple[str, ...]]] = set()
    monkeypatch.setattr(
        codec_warm_up, "launch_all", lambda stack, codecs, *_, looked_up: compiled.add((stack.shapes, codecs))
    )
    core.slots.warm_up.codecs(("int4", "int2"))
    stack = stack_of(core, "model.layers.0.mlp.down_proj.weight")
    head = stack_of(core, "lm_head.weight")
    assert {(stack.shapes, ("int4", "int2")), (head.shapes, ("int4", "int2"))} <= compiled
    assert stack.groups == head.groups == (("int4", "int2"),)
    generation = stack.ops.generation
    load(core, 0, zoo.versions[0])
    assert stack.ops.generation == generation, "what was recorded stays"


def test_what_nobody_waits_for_ends_with_the_engine() -> None:
    begun, end = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        end.wait(10)

    with Later(1) as pool:
        first, second = pool.submit(wait), pool.submit(time.sleep, 10)
        assert begun.wait(10)
        pool.closed = True
        end.set()
        assert {*as_completed([first, second], timeout=10)} == {first, second}
    assert first.exception() is None
    assert isinstance(second.exception(), RuntimeError)


STACKS = ([(4096, 4096), (1024, 4096), (1024, 4096)], [(4096, 4096)], [(14336, 4096)] * 2, [(4096, 14336)])
"""Linears of an 8B model."""
NARROW = ([(2048, 2048), (512, 2048), (512, 2048)], [(2048, 2048)], [(5632, 2048)] * 2, [(2048, 5632)])
"""Linears of a 1B model."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kernels that would be launched, with what they are compiled for; none is."""
    found: set[str] = set()

    def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
        assert 0 not in grid
        found.add(f"{kernel.__name__} {options}")

    for module in (gather, merged, plan, quantize, skinny, triton_backend):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(triton_backend, "overlap", lambda _, starts_early=True: {"launch_pdl": starts_early})
    return found


@pytest.mark.parametrize("linears", [STACKS, NARROW], ids=["8b", "1b"])
@pytest.mark.parametrize("codecs", [("int2",), ("int1",), ("int4", "raw"), ("low_rank",)])
def test_no_step_launches_what_was_not_compiled(linears: Any, codecs: tuple[str, ...], launched: set[str]) -> None:
    """Any decode of up to 256 rows and 64 versions, and random batches of up to 1,024 tokens."""
    ops = TritonOps(torch.device("cpu"), torch.bfloat16)
    stacks = [ops.stack(shapes, 64) for shapes in linears]
    for stack in stacks:
        launch_all(stack, codecs, 16, torch.empty(64, stack.shapes[0][1], dtype=ops.dtype), looked_up=False)
    compiled = set(launched)
    launched.clear()
    steps = list(batches(ops))
    for stack in stacks:
        stack.groups, stack.rank = (codecs,), 16
        row, y = (torch.empty(1, size, dtype=ops.dtype) for size in (stack.shapes[0][1], stack.starts[-1]))
        weight = row.expand(stack.starts[-1], -1)
        for batch in steps:
            x = row.expand(len(batch.index), -1)
            if ops.product.cut(x, weight) is None:
                stack.add_product(y, Activations(row), batch)
            else:
                for rows in (batch, Rows(batch.index)):
                    ops.linear(weight, Activations(x), stack, rows)
    assert launched <= compiled
    assert compiled - launched == {one for one in compiled if one.startswith("merge")}, "compiled for nothing"


def batches(ops: TritonOps) -> Iterator[Rows]:
    for rows in (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 128, 192, 256):
        for versions in (1, 2, 4, 8, 16, 32, 64):
            for longest, halves in ((SOME, False), (MORE, False), (rows, False), (2 * MORE, True)):
                starts, index = (torch.zeros(size, dtype=torch.int32) for size in (min(rows, versions) + 1, rows))
                yield ops.graph_rows(index, Segments(starts, starts[1:]), longest, halves=halves)
    yield ops.rows([(0, 40)], ops.device)
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.choice((1, 1, 1, 7, 30, 100, 600)) for _ in range(draw.randint(1, 64))]
        yield ops.rows([(slot, length) for slot, length in enumerate(lengths)], ops.device)


def test_linears_of_one_input_share_their_kernels(launched: set[str]) -> None:
    """Whatever their widths, and however many lie side by side."""
    ops = TritonOps(torch.device("cpu"), torch.bfloat16)
    for shapes in STACKS:
        launch_all(ops.stack(shapes, 1), ("int2",), 0, torch.empty(64, shapes[0][1]), looked_up=False)
    assert len([one for one in launched if one.startswith("grouped")]) <= 16


def test_compiled_kernels_are_kept_where_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", "before")
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "before")
    keep_kernels(None)
    assert (triton.knobs.cache.dir, os.environ["FLASHINFER_WORKSPACE_BASE"]) == ("before", "before")
    keep_kernels(tmp_path)
    assert triton.knobs.cache.dir == str(tmp_path / "triton")
    assert os.environ["FLASHINFER_WORKSPACE_BASE"] == str(tmp_path)
