"""An engine whose base is in fp8, with deltas of every kind on top, against transformers in float32."""

from pathlib import Path

import pytest
import torch

from deltazip_kernels import LOW_RANK
from deltazip_kernels.fp8 import Fp8Matrix
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.core import EngineCore, build_core, check_fp8
from deltazip_ray.errors import ConfigError
from deltazip_ray.layers import long_segments
from deltazip_ray.layers.writes import Writes
from tests.integration.test_engine_kernels import errors
from tests.integration.test_engine_logits import last_logits, load
from tests.support.engines import SETTINGS, random_prompt
from tests.support.oracle import Oracle
from tests.support.tiny import make_base
from tests.support.zoo import Zoo

LIMIT = 0.25
"""Of the logits' spread: on random weights, which average nothing out, rounding base and activations to 4 bits costs an
eighth. A delta that is left out costs more than one."""


def core_of(zoo: Zoo, kernels: str = "torch") -> EngineCore:
    core = build_core(EngineConfig(**SETTINGS, base_dtype="fp8", kernels=kernels), zoo.base)
    for slot, built in enumerate(zoo.versions):
        load(core, slot, built)
    return core


def error(row: torch.Tensor, oracle: Oracle, prompt: list[int]) -> float:
    """Root mean square of the difference, in units of the logits' spread."""
    expected = oracle.logits(prompt)[-1]
    return float(((row[: len(expected)] - expected) / expected.std()).square().mean().sqrt())


def test_rounding_costs_what_it_should(zoo: Zoo) -> None:
    found = errors(core_of(zoo), zoo)
    assert max(found) < LIMIT
    assert min(found) > 0.02  # it does round


def test_kernels_mean_the_same(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's row by way of the GEMM, that of one version over merged weights, that of the other beside the GEMM."""
    if torch.cuda.is_available():
        pytest.skip("tests/integration/test_engine_cuda.py runs them on a GPU")
    monkeypatch.setattr(long_segments, "MERGE_ROWS", 4)
    core, prompts, slots = (
        core_of(zoo, "triton"),
        [random_prompt(0, 3), random_prompt(2, 5), random_prompt(3, 2)],
        [-1, 1, 3],
    )
    rows = last_logits(core, prompts, slots)
    for row, prompt, slot in zip(rows, prompts, slots, strict=True):
        # Triton's interpreter halves what should round up to a power of two.
        assert error(row, zoo.oracles[zoo.names[slot + 1]], prompt) < 1.6 * LIMIT


def test_low_rank_beside_full_deltas(zoo: Zoo) -> None:
    core, adapted, writes = core_of(zoo), Oracle(zoo.base), Writes()
    targets = core.slots.targets
    for target in targets.values():
        target.clear(3, writes)
    generator = torch.Generator().manual_seed(0)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        module = adapted.model.get_submodule(name)
        up, down = (torch.randn(size, 4, generator=generator) / 4 for size in module.weight.shape)
        module.weight.data += up @ down.T
        targets[f"{name}.weight"].install(3, LOW_RANK, {"up": up, "down": down.T.contiguous()}, writes)
    writes.send()
    prompts = [random_prompt(i, 9 + i) for i in range(4)]
    rows = last_logits(core, prompts, [-1, 0, 1, 3])
    oracles = [zoo.oracles[None], *(zoo.oracles[zoo.names[i]] for i in (1, 2)), adapted]
    for row, oracle, prompt in zip(rows, oracles, prompts, strict=True):
        assert error(row, oracle, prompt) < LIMIT


def test_a_raw_matrix_is_the_fine_tunes_to_the_last_bit(zoo: Zoo) -> None:
    core = core_of(zoo)
    name = "model.layers.1.self_attn.o_proj.weight"
    linear = core.runner.decoder.blocks[1].attention.out
    assert isinstance(linear.weight, Fp8Matrix)
    delta = linear.stack.deltas[0][3]
    assert delta is not None
    served = linear.weight.dequantize(torch.float32) + delta.tensors["values"]
    torch.testing.assert_close(served, zoo.versions[3].merged[name], atol=1e-6, rtol=1e-6)


def test_embedding_and_head_stay(zoo: Zoo) -> None:
    decoder = core_of(zoo).runner.decoder
    assert decoder.embedding.weight.dtype == torch.float32
    assert isinstance(decoder.head.target.base, torch.Tensor)


@pytest.mark.parametrize(
    ("dtype", "capability", "message"),
    [("float16", (9, 0), "goes with dtype bfloat16"), ("bfloat16", (8, 0), "8.9 or later, this one has 8.0")],
)
def test_what_a_gpu_does_not_do_is_refused(dtype: str, capability: tuple[int, int], message: str) -> None:
    config = EngineConfig(device="cuda", base_dtype="fp8", dtype=dtype)
    with pytest.raises(ConfigError, match=message):
        check_fp8(config, capability)
    check_fp8(EngineConfig(device="cuda", base_dtype="fp8", dtype="bfloat16"), (8, 9))


def test_odd_shapes_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path, hidden=136)
    with pytest.raises(ConfigError, match="multiples of 16"):
        build_core(EngineConfig(**SETTINGS, base_dtype="fp8"), base)
