"""Every family from two checkpoints to a merged one that transformers loads, on tiny random models."""

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralConfig

from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.compress.calibration import load_calibration
from deltazip_ray.compress.families import FAMILIES
from deltazip_ray.compress.merge import merge
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import open_pair
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import Skeleton, load_tensors
from deltazip_ray.errors import CheckpointMismatch
from tests.support.families import CONFIGS, GROUPED, save_model
from tests.support.oracle import load_model

SMALL = {"samples": 8, "sequence_length": 24}
RAW = {
    "LlamaForCausalLM": {"input_layernorm.weight"},
    "MistralForCausalLM": {"input_layernorm.weight"},
    "Qwen2ForCausalLM": {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"},
    "Qwen3ForCausalLM": {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
    "Gemma2ForCausalLM": {"post_attention_layernorm.weight", "pre_feedforward_layernorm.weight"},
    "GPTNeoXForCausalLM": {"input_layernorm.bias", "attention.query_key_value.bias", "mlp.dense_4h_to_h.bias"},
}
EVERY = pytest.mark.parametrize("architecture", CONFIGS)


def test_every_family_is_tested() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()


@EVERY
def test_compress_and_merge(tmp_path: Path, architecture: str) -> None:
    base = save_model(tmp_path / "base", CONFIGS[architecture])
    finetuned = save_model(tmp_path / "finetuned", CONFIGS[architecture], moved=0.01)
    options = CompressOptions.model_validate(SMALL)
    manifest = compress_checkpoint(base, finetuned, (tmp_path / "artifact").as_uri(), options)
    assert manifest.base.architecture == architecture
    assert manifest.quality is not None
    assert 0 < max(manifest.quality.block_errors.values()) < 0.2
    entries = {name: entry for blob in manifest.blobs for name, entry in blob.tensors.items()}
    merge(base, tmp_path / "artifact", tmp_path / "merged", dtype=torch.float32)
    target = load_file(finetuned / "model.safetensors")
    start = load_file(base / "model.safetensors")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert entries.keys() == target.keys() == weights.keys()
    for name, entry in entries.items():
        if entry.codec == "raw":
            assert torch.equal(weights[name], target[name]), name
        else:
            assert (weights[name] - target[name]).norm() < 0.25 * (start[name] - target[name]).norm(), name
    for ending in RAW[architecture]:
        assert entries[f"{FAMILIES[architecture].layers}.1.{ending}"].codec == "raw"
    tokens = torch.arange(3, 40)[None]
    wanted, found, unchanged = (logits(path, tokens) for path in (finetuned, tmp_path / "merged", base))
    assert (found - wanted).norm() < 0.2 * (unchanged - wanted).norm()


@EVERY
@torch.no_grad()
def test_the_quality_record_is_the_divergence_of_whole_models(tmp_path: Path, architecture: str) -> None:
    base = save_model(tmp_path / "base", CONFIGS[architecture])
    finetuned = save_model(tmp_path / "finetuned", CONFIGS[architecture], moved=0.01)
    options = CompressOptions.model_validate(SMALL | {"codec": "int2"})
    manifest = compress_checkpoint(base, finetuned, (tmp_path / "artifact").as_uri(), options)
    merge(base, tmp_path / "artifact", tmp_path / "merged", dtype=torch.float32)
    checkpoint = Checkpoint.open(finetuned)
    calibration = load_calibration(checkpoint, Skeleton(checkpoint), options, lambda fraction: None)
    tokens, mask = calibration.tokens[calibration.fitted :], calibration.mask[calibration.fitted :]
    paths = {"finetuned": finetuned, "reconstruction": tmp_path / "merged", "base": base}
    found = {name: logits(path, tokens).log_softmax(-1) for name, path in paths.items()}
    followed = mask[:, 1:]
    losses = {
        name: float(-each[:, :-1].gather(2, tokens[:, 1:, None])[followed].mean()) for name, each in found.items()
    }
    ours = found["finetuned"][mask]
    divergences = {name: float((ours.exp() * (ours - each[mask])).sum(-1).mean()) for name, each in found.items()}
    quality = manifest.quality
    assert quality is not None
    assert quality.kl_divergence == pytest.approx(divergences["reconstruction"], rel=0.01)
    assert quality.base_kl_divergence == pytest.approx(divergences["base"], rel=0.01)
    assert {name: log(each) for name, each in quality.perplexities.items()} == pytest.approx(losses, rel=1e-4)


@torch.no_grad()
def logits(path: Path, tokens: Tensor) -> Tensor:
    found: Tensor = load_model(path)(tokens).logits
    return found


@EVERY
def test_block_by_block_is_what_transformers_computes(tmp_path: Path, architecture: str) -> None:
    checkpoint = Checkpoint.open(save_model(tmp_path / "base", CONFIGS[architecture]))
    skeleton = Skeleton(checkpoint)
    options = CompressOptions.model_validate(SMALL)
    with torch.no_grad():
        calibration = load_calibration(checkpoint, skeleton, options, lambda fraction: None)
        runner = Runner(skeleton, calibration, options)
        hidden = skeleton.embed(checkpoint.tensor(skeleton.embedding)[calibration.tokens])
        for index in range(skeleton.blocks):
            prefix = skeleton.block_name(index)
            weights = load_tensors(checkpoint, [f"{prefix}.{name}" for name in skeleton.block_weights(index)])
            block = skeleton.part(prefix, {name[len(prefix) + 1 :]: weight for name, weight in weights.items()})
            hidden = runner.run(block, hidden)
        norm = skeleton.final_norm(load_tensors(checkpoint, skeleton.norms))
        model = load_model(checkpoint.path)
        expected = model.base_model(calibration.tokens, attention_mask=calibration.mask.long()).last_hidden_state
        whole: Any = skeleton.whole(load_tensors(checkpoint, skeleton.shapes()), torch.device("cpu"))
        torch.testing.assert_close(whole(calibration.tokens).logits, model(calibration.tokens).logits)
    torch.testing.assert_close(norm(hidden)[calibration.mask], expected[calibration.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM", "GPTNeoXForCausalLM"])
def test_a_target_counts_norms_and_biases(tmp_path: Path, architecture: str) -> None:
    config = CONFIGS[architecture]
    base, finetuned = save_model(tmp_path / "base", config), save_model(tmp_path / "finetuned", config, moved=0.01)
    options = CompressOptions.model_validate(SMALL | {"target_ratio": 6})
    manifest = compress_checkpoint(base, finetuned, (tmp_path / "artifact").as_uri(), options)
    numbers = sum(tensor.numel() for tensor in load_file(finetuned / "model.safetensors").values())
    assert 6 <= 2 * numbers / manifest.bytes_artifact < 6.6


def test_buffers_that_old_releases_saved_are_no_weights(tmp_path: Path) -> None:
    config = CONFIGS["GPTNeoXForCausalLM"]
    base, finetuned = save_model(tmp_path / "base", config), save_model(tmp_path / "finetuned", config, moved=0.01)
    prefix = "gpt_neox.layers.0.attention"
    buffers = {
        f"{prefix}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        f"{prefix}.masked_bias": torch.tensor(-1e9),
        f"{prefix}.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(load_file(base / "model.safetensors") | buffers, base / "model.safetensors", {"format": "pt"})
    compress_checkpoint(base, finetuned, (tmp_path / "artifact").as_uri(), CompressOptions.model_validate(SMALL))
    merge(base, tmp_path / "artifact", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == load_file(finetuned / "model.safetensors").keys()


def test_calibration_stays_inside_a_sliding_window(tmp_path: Path) -> None:
    config = MistralConfig(**GROUPED, sliding_window=16)
    pair = open_pair(save_model(tmp_path / "base", config), save_model(tmp_path / "finetuned", config, moved=0.01))
    options = CompressOptions.model_validate(SMALL)
    with torch.no_grad():
        calibration = load_calibration(pair.finetuned, pair.skeleton, options, lambda fraction: None)
    assert calibration.tokens.shape[1] == 16


def test_families_and_windows_do_not_mix(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", CONFIGS["MistralForCausalLM"])
    other = save_model(tmp_path / "other", CONFIGS["LlamaForCausalLM"])
    with pytest.raises(CheckpointMismatch, match="architecture is MistralForCausalLM in the base, LlamaForCausalLM"):
        open_pair(base, other)
    wider = save_model(tmp_path / "wider", MistralConfig(**GROUPED, sliding_window=32, head_dim=48))
    with pytest.raises(CheckpointMismatch, match="sliding_window is 24 in the base, 32 in the fine-tune"):
        open_pair(base, wider)
