"""Logits of one mixed batch against transformers, in several architectures and number types."""

import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.core import EngineCore, build_core
from deltazip_ray.engine.step_inputs import single_tokens
from deltazip_ray.errors import CheckpointInvalid, ConfigError
from deltazip_ray.layers.attention.cache import CacheShape
from deltazip_ray.layers.attention.choose import make_attention
from deltazip_ray.models.decoder_config import read_decoder_config
from deltazip_ray.residency.tiers import HostDelta
from deltazip_ray.scheduler.batch import Batch, Chunk
from deltazip_ray.scheduler.request import GenerateRequest
from deltazip_ray.scheduler.sequence import SequenceState
from tests.support.engines import SETTINGS, random_prompt
from tests.support.families import CONFIGS, GROUPED, SIZES, save_model
from tests.support.oracle import Oracle
from tests.support.tiny import make_finetune
from tests.support.versions import BuiltVersion, build_version
from tests.support.zoo import Zoo

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 160,
    "short_factor": [1.0 + i / 8 for i in range(16)],
    "long_factor": [4.0] * 16,
}
PROMPTS = [random_prompt(i, 20 + 21 * i) for i in range(6)]
"""The longest are several windows long."""
VARIATIONS: dict[str, PreTrainedConfig] = {
    "llama3-rope": LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROPE),
    "longrope": LlamaConfig(**GROUPED, rope_parameters=LONGROPE),
    "linear-rope": LlamaConfig(**GROUPED, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "dynamic-rope": LlamaConfig(**GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "mistral-no-window": MistralConfig(**GROUPED, sliding_window=None),
    "qwen3-yarn": Qwen3Config(**GROUPED, head_dim=32, attention_bias=True, rope_parameters=YARN),
    "gemma2-llama3-rope": Gemma2Config(
        **GROUPED, head_dim=48, attention_bias=True, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE
    ),
    "all-biases": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "one-kv-head-wide": LlamaConfig(
        **GROUPED | {"num_key_value_heads": 1}, head_dim=48, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"
    ),
    "qwen2-windows": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "gemma2-no-caps": Gemma2Config(
        **GROUPED, head_dim=48, sliding_window=24, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "neox-serial": GPTNeoXConfig(
        **SIZES,
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="gelu_new",
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5},
    ),
}


def last_logits(core: EngineCore, prompts: list[list[int]], slots: list[int], *, single: bool = False) -> torch.Tensor:
    """Logits after each prompt, all prompts in one batch: whole, by halves, or but for one token before it.

    Slots must ascend. ``single``: each token of the batch is a chunk of its own, as in recorded steps.
    """
    sequences = [
        SequenceState(GenerateRequest(str(i), None, tuple(prompt)), slot)
        for i, (prompt, slot) in enumerate(zip(prompts, slots, strict=True))
    ]
    tables = [array("i", range(i * 16, i * 16 + 16)) for i in range(len(prompts))]
    halves = [(0, len(prompt) // 2, len(prompt) - 1)[i % 3] for i, prompt in enumerate(prompts)]
    first = [
        Chunk(s, tuple(s.tokens[:half]), 0, table, samples=False)
        for s, half, table in zip(sequences, halves, tables, strict=True)
        if half
    ]
    rest = [
        Chunk(s, tuple(s.tokens[half:]), half, table, samples=True)
        for s, half, table in zip(sequences, halves, tables, strict=True)
    ]
    with torch.inference_mode():
        core.runner.decoder(core.runner.prepare(Batch(tuple(first))))
        batch = Batch(tuple(single_tokens(rest) if single else rest))
        logits = core.runner.decoder(core.runner.prepare(batch))
    return logits[torch.tensor([len(chunk.tokens) for chunk in rest]).cumsum(0) - 1] if single else logits


def load(core: EngineCore, slot: int, built: BuiltVersion) -> None:
    core.slots.check(built.manifest)
    core.slots.load(slot, HostDelta(built.manifest, {b: memoryview(data) for b, data in built.blobs.items()}, "host"))


def mixed_logits(
    core: EngineCore, zoo: Zoo, *, single: bool = False
) -> list[tuple[torch.Tensor, str | None, list[int]]]:
    """For three prompts of the base and of each version: their logits from one batch, the version, the prompt."""
    for slot, built in enumerate(zoo.versions):
        load(core, slot, built)
    slots = [slot for slot in range(-1, len(zoo.versions)) for _ in range(3)]
    prompts = [random_prompt(i, 6 + 5 * i) for i in range(len(slots))]
    logits = last_logits(core, prompts, slots, single=single)
    return [(row, zoo.names[slot + 1], prompt) for row, slot, prompt in zip(logits, slots, prompts, strict=True)]


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("fixture", ["zoo", "tied_zoo"])
def test_float32(fixture: str, single: bool, request: pytest.FixtureRequest) -> None:
    zoo: Zoo = request.getfixturevalue(fixture)
    core = build_core(EngineConfig(**SETTINGS), zoo.base)
    for row, version, prompt in mixed_logits(core, zoo, single=single):
        expected = zoo.oracles[version].logits(prompt)[-1]
        assert expected.std() > 0.5
        # float32 sums in another order: 24 bits, some hundred terms, two layers.
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=1e-4)
        assert (row[len(expected) :] == -torch.inf).all()


def test_bfloat16_is_as_near_to_float32_as_transformers_is(zoo: Zoo, tmp_path: Path) -> None:
    core = build_core(EngineConfig(**SETTINGS, dtype="bfloat16"), zoo.base)
    halves: dict[str | None, Oracle] = {None: Oracle(zoo.base, torch.bfloat16)}
    for built in zoo.versions:
        halves[built.version] = Oracle(built.write_merged(tmp_path / built.version), torch.bfloat16)
    ours, theirs = [], []
    for row, version, prompt in mixed_logits(core, zoo):
        exact = zoo.oracles[version].logits(prompt)[-1]
        ours.append((row[: len(exact)] - exact).square().mean())
        theirs.append((halves[version].logits(prompt)[-1] - exact).square().mean())
    error, reference = torch.stack(ours).mean().sqrt(), torch.stack(theirs).mean().sqrt()
    # Root mean squares over 15 prompts: both round the same places, so they are about the same.
    assert error < 1.2 * reference
    assert error < 0.05 * zoo.oracles[None].logits(random_prompt(0, 30)).std()


def test_a_cache_in_fp8_costs_little(zoo: Zoo) -> None:
    core = build_core(EngineConfig(**SETTINGS, kv_dtype="fp8"), zoo.base)
    errors = []
    for row, version, prompt in mixed_logits(core, zoo):
        exact = zoo.oracles[version].logits(prompt)[-1]
        errors.append(((row[: len(exact)] - exact) / exact.std()).square().mean())
    # e4m3 rounds a number by 1/16 of it at most. Attention of these models, which learned nothing, is a mean of values.
    assert 0.01 < torch.stack(errors).mean().sqrt() < 0.1


@dataclass(frozen=True)
class Family:
    """A base and a version of it."""

    base: Path
    built: BuiltVersion
    merged: Path

    def logits(self, dtype: torch.dtype) -> torch.Tensor:
        """For three prompts each of base and version, all in one batch, float32 ``[6, vocab]``."""
        core = build_core(EngineConfig(**SETTINGS, dtype=str(dtype).removeprefix("torch.")), self.base)
        load(core, 2, self.built)
        return last_logits(core, PROMPTS, [-1, -1, -1, 2, 2, 2]).float()

    def oracle(self, dtype: torch.dtype) -> torch.Tensor:
        """The same by transformers."""
        base, merged = Oracle(self.base, dtype), Oracle(self.merged, dtype)
        oracles = [base] * 3 + [merged] * 3
        return torch.stack([oracle.logits(prompt)[-1] for prompt, oracle in zip(PROMPTS, oracles, strict=True)])


def make_family(path: Path, config: PreTrainedConfig) -> Family:
    base, tune = save_model(path / "base", config), save_model(path / "tune", config, moved=0.05)
    built = build_version(base, tune)
    return Family(base, built, built.write_merged(path / "merged"))


@pytest.mark.parametrize("config", [*CONFIGS.values(), *VARIATIONS.values()], ids=[*CONFIGS, *VARIATIONS])
def test_every_family(config: PreTrainedConfig, tmp_path: Path) -> None:
    family = make_family(tmp_path, config)
    torch.testing.assert_close(family.logits(torch.float32), family.oracle(torch.float32), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_family_in_bfloat16(architecture: str, tmp_path: Path) -> None:
    family = make_family(tmp_path, CONFIGS[architecture])
    exact = family.oracle(torch.float32)
    error, reference = (
        (logits - exact).square().mean().sqrt()
        for logits in (family.logits(torch.bfloat16), family.oracle(torch.bfloat16))
    )
    # Root mean squares over six prompts: the places that round are not all the same.
    assert error < 1.5 * reference
    assert error < 0.03 * exact.std()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"hidden_size": "wide"}, "does not describe a LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "rope type 'proportional' is",
        ),
        ({"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True}, "from left to right only"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked_attention"] * 2}, "layer_types must name"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(change: dict[str, object], message: str) -> None:
    raw = CONFIGS["LlamaForCausalLM"].to_dict() | {"architectures": ["LlamaForCausalLM"]}
    assert read_decoder_config(raw).hidden_size == 128
    with pytest.raises(ConfigError, match=message):
        read_decoder_config(raw | change)


def test_yarn_extends_the_context() -> None:
    raw = VARIATIONS["qwen3-yarn"].to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    assert raw["max_position_embeddings"] == 512
    assert read_decoder_config(raw).max_positions == 32 * 32


def test_longrope_is_served_as_far_as_its_frequencies_stay() -> None:
    raw = VARIATIONS["longrope"].to_dict() | {"architectures": ["LlamaForCausalLM"]}
    assert raw["max_position_embeddings"] == 512
    assert read_decoder_config(raw).max_positions == 160


def test_a_config_of_another_checkpoint_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    make_finetune(zoo.base, tmp_path)
    LlamaConfig.from_pretrained(tmp_path, intermediate_size=64).save_pretrained(tmp_path)
    with pytest.raises(CheckpointInvalid, match=r"gate_proj\.weight has shape \[320, 128\]"):
        build_core(EngineConfig(**SETTINGS), tmp_path)


def test_a_gpu_without_flashinfer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.delitem(sys.modules, "deltazip_ray.layers.attention.flashinfer", raising=False)
    shape = CacheShape(layers=1, block_size=16, heads=4, kv_heads=2, head_dim=128)
    config = EngineConfig(device="cuda", dtype="bfloat16", attention="flashinfer")
    with pytest.raises(ConfigError, match=r"pip install 'deltazip-ray\[gpu\]'"):
        make_attention(config, shape, torch.bfloat16, torch.device("cuda"))
