"""Logits of one mixed batch against transformers, in several architectures and number types."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.core import EngineCore, build_core
from deltazip_ray.errors import CheckpointInvalid, ConfigError
from deltazip_ray.models.decoder_config import read_decoder_config
from deltazip_ray.residency.tiers import HostDelta
from deltazip_ray.scheduler.batch import Batch, Chunk
from deltazip_ray.scheduler.request import GenerateRequest
from deltazip_ray.scheduler.sequence import SequenceState
from tests.support.engines import SETTINGS, random_prompt
from tests.support.oracle import Oracle
from tests.support.tiny import make_finetune
from tests.support.versions import BuiltVersion, build_version
from tests.support.zoo import Zoo

SIZES = {
    "vocab_size": 90,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama3-rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "linear-rope": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "all-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "one-kv-head-wide": LlamaConfig(**SIZES | {"num_key_value_heads": 1}, head_dim=32, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
}


def last_logits(core: EngineCore, prompts: list[list[int]], slots: list[int]) -> torch.Tensor:
    """Logits after each prompt, all prompts in one batch; those of odd number in two chunks. Slots must ascend."""
    sequences = [
        SequenceState(GenerateRequest(str(i), None, tuple(prompt)), slot)
        for i, (prompt, slot) in enumerate(zip(prompts, slots, strict=True))
    ]
    tables = [list(range(i * 16, i * 16 + 16)) for i in range(len(prompts))]
    halves = [len(prompt) // 2 if i % 2 else 0 for i, prompt in enumerate(prompts)]
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
        return core.runner.decoder(core.runner.prepare(Batch(tuple(rest))))


def load(core: EngineCore, slot: int, built: BuiltVersion) -> None:
    core.slots.check(built.manifest)
    core.slots.load(slot, HostDelta(built.manifest, {b: memoryview(data) for b, data in built.blobs.items()}, "host"))


def mixed_logits(core: EngineCore, zoo: Zoo) -> list[tuple[torch.Tensor, str | None, list[int]]]:
    """For three prompts of the base and of each version: their logits from one batch, the version, the prompt."""
    for slot, built in enumerate(zoo.versions):
        load(core, slot, built)
    slots = [slot for slot in range(-1, len(zoo.versions)) for _ in range(3)]
    prompts = [random_prompt(i, 6 + 5 * i) for i in range(len(slots))]
    logits = last_logits(core, prompts, slots)
    return [(row, zoo.names[slot + 1], prompt) for row, slot, prompt in zip(logits, slots, prompts, strict=True)]


@pytest.mark.parametrize("fixture", ["zoo", "tied_zoo"])
def test_float32(fixture: str, request: pytest.FixtureRequest) -> None:
    zoo: Zoo = request.getfixturevalue(fixture)
    core = build_core(EngineConfig(**SETTINGS), zoo.base)
    for row, version, prompt in mixed_logits(core, zoo):
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


@pytest.mark.parametrize("family", FAMILIES)
def test_variations_of_the_architecture(family: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "tune")
    built = build_version(tmp_path / "base", tmp_path / "tune")
    core = build_core(EngineConfig(**SETTINGS), tmp_path / "base")
    load(core, 2, built)
    prompts = [random_prompt(i, 20 + 37 * i) for i in range(4)]
    logits = last_logits(core, prompts, [-1, -1, 2, 2])
    base, merged = Oracle(tmp_path / "base"), Oracle(built.write_merged(tmp_path / "merged"))
    for row, prompt, oracle in zip(logits, prompts, (base, base, merged, merged), strict=True):
        torch.testing.assert_close(row, oracle.logits(prompt)[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not served"),
        ({"hidden_size": "wide"}, "is not that of a LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(change: dict[str, object], message: str) -> None:
    raw = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).to_dict()
    assert read_decoder_config(raw).hidden_size == 96
    with pytest.raises(ConfigError, match=message):
        read_decoder_config(raw | change)


def test_a_config_of_another_checkpoint_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    make_finetune(zoo.base, tmp_path)
    LlamaConfig.from_pretrained(tmp_path, intermediate_size=64).save_pretrained(tmp_path)
    with pytest.raises(CheckpointInvalid, match=r"gate_proj\.weight is \[320, 128\]"):
        build_core(EngineConfig(**SETTINGS), tmp_path)
