"""The engine with the Triton kernels, in their interpreter on a CPU, against transformers running merged weights."""

from collections.abc import Iterator

import pytest
import torch

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.core import EngineCore, build_core
from deltazip_ray.layers import long_segments
from deltazip_ray.layers.targets import MatrixTarget
from deltazip_ray.layers.triton_ops import TritonStack
from tests.integration.test_engine_logits import last_logits, load
from tests.support.engines import SETTINGS, random_prompt
from tests.support.zoo import Zoo


@pytest.fixture(scope="module")
def core(zoo: Zoo) -> Iterator[EngineCore]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    core = build_core(EngineConfig(**SETTINGS, device=device, kernels="triton", attention="triton"), zoo.base)
    for slot, built in enumerate(zoo.versions):
        load(core, slot, built)
    yield core
    core.slots.warm_up.close()  # on a GPU its threads would still compile when the process ends, and say so at length


def errors(core: EngineCore, zoo: Zoo, prompts_each: int = 2) -> list[torch.Tensor]:
    """By version, the base first: the difference to transformers in units of the logits' spread, over all prompts."""
    slots = [slot for slot in range(-1, len(zoo.versions)) for _ in range(prompts_each)]
    prompts = [random_prompt(i, 3 + i) for i in range(len(slots))]
    logits = last_logits(core, prompts, slots).cpu()
    found: dict[int, list[torch.Tensor]] = {}
    for row, slot, prompt in zip(logits, slots, prompts, strict=True):
        expected = zoo.oracles[zoo.names[slot + 1]].logits(prompt)[-1]
        found.setdefault(slot, []).append((row[: len(expected)] - expected) / expected.std())
        assert (row[len(expected) :] == -torch.inf).all()
    return [torch.cat(rows).square().mean().sqrt() for rows in found.values()]


def test_int8_activations_cost_little(core: EngineCore, zoo: Zoo) -> None:
    base, *versions = errors(core, zoo)
    assert base < 1e-4  # float32 throughout
    # Rounding to 8 bits moves a value by at most 1/254 of its row's largest; deltas are a fifth of these weights.
    assert max(versions) < 0.03


def test_codecs_may_have_launches_of_their_own(core: EngineCore, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    for stack in {target.stack for target in core.slots.targets.values() if isinstance(target, MatrixTarget)}:
        assert isinstance(stack, TritonStack)
        monkeypatch.setattr(stack, "groups", tuple((name,) for name in stack.codecs))
    assert max(errors(core, zoo, prompts_each=1)) < 0.03


def test_long_segments_run_over_merged_weights(core: EngineCore, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_segments, "MERGE_ROWS", 1)
    assert max(errors(core, zoo)) < 1e-4
