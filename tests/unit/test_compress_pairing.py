"""Whether a base and a fine-tune belong together, and what is said when they don't."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from deltazip_ray.compress.pairing import open_pair
from deltazip_ray.errors import CheckpointInvalid, CheckpointMismatch
from tests.support.tiny import make_base, make_finetune


def edit_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def finetuned(base: Path, tmp_path: Path) -> Path:
    return make_finetune(base, tmp_path / "finetuned")


def test_a_finetune_with_added_tokens(base: Path, tmp_path: Path) -> None:
    pair = open_pair(base, make_finetune(base, tmp_path / "grown", added=("<a>", "<b>")))
    assert pair.added == 2
    assert pair.base_vocab + 2 == pair.skeleton.shapes()[pair.skeleton.head][0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 1e-5),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),
        ("num_attention_heads", 8),
        ("tie_word_embeddings", True),
    ],
)
def test_settings_that_change_the_function_must_agree(base: Path, finetuned: Path, key: str, value: object) -> None:
    edit_config(finetuned, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointMismatch, match=f"{key} is .* in the base, .* in the fine-tune"):
        open_pair(base, finetuned)


def test_settings_that_leave_the_function_alone_may_differ(base: Path, finetuned: Path) -> None:
    edit_config(finetuned, lambda config: config.update(max_position_embeddings=4096, use_cache=False, eos_token_id=5))
    assert open_pair(base, finetuned).added == 0


def test_the_context_length_counts_where_it_scales_the_rotation(base: Path, finetuned: Path) -> None:
    rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    for path in (base, finetuned):
        edit_config(path, lambda config: config.update(rope_parameters=rope))
    edit_config(finetuned, lambda config: config.update(max_position_embeddings=4096))
    with pytest.raises(CheckpointMismatch, match="max_position_embeddings is 512 in the base, 4096"):
        open_pair(base, finetuned)


def test_old_and_new_spellings_of_rope_agree(base: Path, finetuned: Path) -> None:
    def older(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config.update(rope_theta=rope["rope_theta"], rope_scaling=None)

    edit_config(base, older)
    assert open_pair(base, finetuned).added == 0


def test_a_vocabulary_may_only_grow(base: Path, tmp_path: Path) -> None:
    grown = make_finetune(base, tmp_path / "grown", added=("<a>",))
    with pytest.raises(CheckpointMismatch, match="86 tokens, fewer than the 87"):
        open_pair(grown, make_finetune(base, tmp_path / "other"))


def test_other_sizes(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="hidden_size is 128 in the base, 64 in the fine-tune"):
        open_pair(base, make_base(tmp_path / "narrow", hidden=64))
    with pytest.raises(CheckpointMismatch, match="num_hidden_layers is 2 in the base, 3 in the fine-tune"):
        open_pair(base, make_base(tmp_path / "deep", layers=3))


def test_a_stranger_of_the_same_shape(base: Path, finetuned: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="nothing in common with it: give the base"):
        open_pair(make_base(tmp_path / "stranger", seed=7), finetuned)
    edit_tensors(finetuned, lambda tensors: [tensor.mul_(-1) for name, tensor in tensors.items() if "mlp" in name])
    assert open_pair(base, finetuned).added == 0


def test_tensors_that_the_architecture_does_not_know(base: Path, finetuned: Path) -> None:
    adapter = "model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(finetuned, lambda tensors: tensors.update({adapter: torch.zeros(4, 128)}))
    with pytest.raises(CheckpointInvalid, match=f"does not know: {adapter}; merge adapters"):
        open_pair(base, finetuned)


def test_buffers_of_old_releases_are_ignored(base: Path, finetuned: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(finetuned, lambda tensors: tensors.update({name: torch.ones(16)}))
    assert open_pair(base, finetuned).added == 0


def test_missing_tensors(base: Path, finetuned: Path) -> None:
    edit_tensors(finetuned, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointInvalid, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        open_pair(base, finetuned)


def test_shapes_that_the_config_denies(base: Path, finetuned: Path) -> None:
    edit_tensors(finetuned, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    with pytest.raises(CheckpointInvalid, match=r"model\.norm\.weight is \[64\], but by config\.json it is \[128\]"):
        open_pair(base, finetuned)


def test_a_tied_head_may_be_saved_but_not_differ(tmp_path: Path) -> None:
    base = make_base(tmp_path / "tied", tied=True)
    finetuned = make_finetune(base, tmp_path / "finetuned")
    edit_tensors(finetuned, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert open_pair(base, finetuned).skeleton.head == "model.embed_tokens.weight"
    edit_tensors(finetuned, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointInvalid, match=r"ties lm_head\.weight to .*, but they differ"):
        open_pair(base, finetuned)


def test_an_architecture_that_is_not_supported(base: Path, finetuned: Path) -> None:
    edit_config(finetuned, lambda config: config.update(architectures=["OPTForCausalLM"]))
    with pytest.raises(CheckpointInvalid, match=r"architecture OPTForCausalLM; supported are .*LlamaForCausalLM"):
        open_pair(base, finetuned)


def test_a_config_that_transformers_refuses(base: Path, finetuned: Path) -> None:
    edit_config(finetuned, lambda config: config.update(hidden_size="wide"))
    with pytest.raises(CheckpointInvalid, match=r"config\.json is not usable"):
        open_pair(base, finetuned)


def test_biases_are_part_of_the_architecture(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    for name in ("base", "finetuned"):
        model.save_pretrained(tmp_path / name)
    pair = open_pair(tmp_path / "base", tmp_path / "finetuned")
    assert "self_attn.q_proj.bias" in pair.skeleton.block_weights(0)
