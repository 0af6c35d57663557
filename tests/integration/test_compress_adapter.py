"""LoRA adapters become artifacts: what is merged is base + scale · B · A, and what is not supported is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from deltazip_kernels.layout import ROWS as TILE
from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.compress import vocabulary
from deltazip_ray.compress.merge import merge
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import open_pair
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.errors import CheckpointInvalid, CheckpointMismatch, CompressionError, DeltaZipError
from tests.support.adapters import QKVO, make_adapter
from tests.support.tiny import make_base, make_tokenizer

SMALL = {"samples": 8, "sequence_length": 24}
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float16, as bases are."""
    folder = tmp_path_factory.mktemp("base")
    make_base(folder / "wide")
    LlamaForCausalLM.from_pretrained(folder / "wide", dtype=torch.float16).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    return folder / "base"


def compress(base: Path, adapter: Path, out: Path, **options: object) -> Manifest:
    return compress_checkpoint(base, adapter, out.as_uri(), CompressOptions.model_validate(SMALL | options))


def products(adapter: Path, scales: dict[str, float]) -> dict[str, Tensor]:
    """By weight, scale · B · A; ``scales`` by the end of the module's name."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            scale = next(value for end, value in scales.items() if module.endswith(end))
            found[module.removeprefix("base_model.model.") + ".weight"] = (
                scale * tensors[f"{module}.lora_B.weight"] @ down
            )
    return found


def test_an_adapter_becomes_an_artifact(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "ROWS", TILE)
    adapter = make_adapter(base, tmp_path / "adapter", modules=(*QKVO, "lm_head"))
    manifest = compress(base, adapter, tmp_path / "artifact")
    start, deltas = load_file(base / "model.safetensors"), products(adapter, {"": 2.0})
    assert {name for blob in manifest.blobs for name in blob.tensors} == deltas.keys()
    assert {entry.codec for blob in manifest.blobs for entry in blob.tensors.values()} == {"low_rank"}
    assert manifest.bytes_finetuned == sum(tensor.nbytes for tensor in start.values())
    for blob in manifest.blobs:
        for name, entry in blob.tensors.items():
            assert entry.bytes_finetuned == start[name].nbytes
            assert entry.rank == 4
            assert entry.relative_error is not None
            assert entry.relative_error < 0.001
    merge(base, tmp_path / "artifact", tmp_path / "merged", dtype=torch.float32)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    for name, weight in start.items():
        delta = deltas.get(name, torch.zeros(weight.shape))
        assert (merged[name] - weight.float() - delta).norm() <= 0.005 * delta.norm(), name
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    merge(base, tmp_path / "artifact", tmp_path / "half")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


@pytest.mark.parametrize(
    ("settings", "ranks", "scales"),
    [
        ({}, {}, {"": 2.0}),
        ({"use_rslora": True}, {}, {"": 8 / math.sqrt(4)}),
        ({"lora_alpha": 5}, {}, {"": 5 / 4}),
        ({"rank_pattern": {"v_proj": 2}}, {"v_proj": 2}, {"v_proj": 4.0, "": 2.0}),
        ({"alpha_pattern": {"layers.1.self_attn.k_proj": 1}}, {}, {"layers.1.self_attn.k_proj": 0.25, "": 2.0}),
        ({"alpha_pattern": {"proj": 1}}, {}, {"": 2.0}),
    ],
    ids=["plain", "rslora", "alpha", "rank-pattern", "alpha-pattern", "no-whole-word"],
)
def test_the_product_is_scaled_as_peft_does(
    base: Path, tmp_path: Path, settings: dict[str, Any], ranks: dict[str, int], scales: dict[str, float]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", ranks=ranks, **settings)
    start, deltas = load_file(base / "model.safetensors"), products(adapter, scales)
    pair = open_pair(base, adapter)
    for name, weight in start.items():
        expected = weight.float() + deltas[name] if name in deltas else weight
        torch.testing.assert_close(pair.finetuned.tensor(name), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("goal", [{"codec": "int2"}, {"target_ratio": 20}, {"max_error": 0.01}], ids=str)
def test_products_stay_products_beside_any_goal(base: Path, tmp_path: Path, goal: dict[str, Any]) -> None:
    head = 1.1 * load_file(base / "model.safetensors")["lm_head.weight"]
    adapter = make_adapter(
        base, tmp_path / "adapter", replaced={"lm_head.weight": head}, modules_to_save=["lm_head"], rank=2
    )
    manifest = compress(base, adapter, tmp_path / "artifact", **goal)
    codecs = {name: entry.codec for blob in manifest.blobs for name, entry in blob.tensors.items()}
    assert {codec for name, codec in codecs.items() if name != "lm_head.weight"} == {"low_rank"}
    assert codecs["lm_head.weight"] != "low_rank"
    if "target_ratio" in goal:
        assert 20 * manifest.bytes_artifact <= manifest.bytes_finetuned


def test_a_product_may_be_coded_and_a_rank_may_be_too_high(base: Path, tmp_path: Path) -> None:
    q0, q1 = f"{Q0}.weight", f"{Q0.replace('0', '1')}.weight"
    manifest = compress(base, make_adapter(base, tmp_path / "a"), tmp_path / "coded", codecs={q0: "int3"})
    entries = {name: entry for blob in manifest.blobs for name, entry in blob.tensors.items()}
    assert (entries[q0].codec, entries[q0].rank, entries[q1].codec) == ("int3", None, "low_rank")
    # In int4 these take fewer bytes than 2 x 128 x 40 numbers do.
    wide = compress(base, make_adapter(base, tmp_path / "b", rank=40), tmp_path / "wide", codecs={q1: "low_rank"})
    codecs = {name: entry.codec for blob in wide.blobs for name, entry in blob.tensors.items()}
    assert (codecs[q0], codecs[q1]) == ("int4", "low_rank")
    with pytest.raises(CompressionError, match=r"low_rank for lm_head.weight, which has no product"):
        compress(base, tmp_path / "a", tmp_path / "none", codecs={"lm_head.weight": "low_rank"})


def test_modules_to_save_replace_the_base_weights(base: Path, tmp_path: Path) -> None:
    start = load_file(base / "model.safetensors")
    replaced = {name: 1.5 * start[name] for name in ("lm_head.weight", "model.norm.weight")}
    adapter = make_adapter(base, tmp_path / "adapter", replaced=replaced, modules_to_save=["lm_head", "norm"])
    manifest = compress(base, adapter, tmp_path / "artifact", codecs={"lm_head.weight": "raw"})
    assert [blob.block for blob in manifest.blobs] == ["layers.0", "layers.1", "outer"]
    merge(base, tmp_path / "artifact", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in replaced.items():
        assert torch.equal(merged[name], weight)


def test_an_adapter_with_a_tokenizer_brings_it_along(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(adapter)
    manifest = compress(base, adapter, tmp_path / "artifact")
    merge(base, tmp_path / "artifact", tmp_path / "merged")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (adapter / name).read_bytes()
    assert "generation_config.json" in manifest.files


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "sets use_dora, which is not supported: merge it into its base"),
        ({"lora_bias": True, "fan_in_fan_out": True}, "sets lora_bias, fan_in_fan_out"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "sets layer_replication"),
        ({"trainable_token_indices": [3]}, "sets trainable_token_indices"),
        ({"bias": "all"}, "sets bias, which is not supported"),
        ({"peft_type": "IA3"}, "describes a IA3 adapter, and only LORA is supported"),
        ({"rank_pattern": {r"layers\.[01]\..*": 2}}, "selects modules by the regular expression"),
        ({"r": 0}, "r: Input should be greater"),
        ({"r": 8}, "not a product of rank 8"),
    ],
)
def test_features_that_are_not_supported(base: Path, tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises((CheckpointInvalid, CheckpointMismatch)) as raised:
        open_pair(base, adapter)
    assert told in raised.value.message


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        (f"base_model.model.{Q0}.lora_magnitude_vector", torch.ones(128), "is not part of a linear layer"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 86), "is not part of a linear layer"),
        (f"base_model.model.{Q0}.lora_B.bias", torch.ones(128), "is not part of a linear layer"),
        ("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", torch.ones(4, 128), "which .* does not have"),
        (
            "base_model.model.model.embed_tokens.weight",
            torch.ones(90, 128),
            r"shape \[90, 128\], but in .* \[86, 128\]",
        ),
        (f"base_model.model.{Q0}.lora_A.weight", None, "only one of lora_A and lora_B"),
    ],
    ids=["dora", "embedding", "bias", "other-base", "resized", "half"],
)
def test_tensors_that_are_not_supported(base: Path, tmp_path: Path, key: str, value: Tensor | None, told: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(DeltaZipError, match=told):
        open_pair(base, adapter)


def test_broken_adapters(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "nan", modules=QKVO[:1])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{Q0}.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointInvalid, match=f"{Q0}.weight holds NaN or Inf"):
        compress(base, adapter, tmp_path / "artifact")

    coded = make_adapter(base, tmp_path / "coded")
    (coded / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    with pytest.raises(CheckpointInvalid, match="wants to run code of its own"):
        open_pair(base, coded)
    (coded / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointInvalid, match=r"tokenizer_config\.json is not a JSON object"):
        open_pair(base, coded)

    pickled = make_adapter(base, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(CheckpointInvalid, match="safe_serialization=True, not pickled"):
        open_pair(base, pickled)
    (pickled / "adapter_model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(CheckpointInvalid, match="is not a safetensors file"):
        open_pair(base, pickled)
