"""From two checkpoints to an artifact and back: every codec, every shape that a fine-tune takes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from deltazip_kernels.layout import CODECS, packed_layout, unpack
from deltazip_ray.artifact.artifact import open_artifact, verify_artifact
from deltazip_ray.artifact.blob import read_blob
from deltazip_ray.artifact.checkpoint import Checkpoint, base_digest
from deltazip_ray.artifact.lossless import read_verified
from deltazip_ray.artifact.manifest import Manifest, blob_key
from deltazip_ray.compress.merge import merge
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.errors import BaseMismatch, BlobCorrupt, CheckpointInvalid, CompressionError, ConfigError
from tests.support.tiny import make_base, make_finetune, make_tokenizer

SMALL = {"samples": 8, "sequence_length": 24}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def finetuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finetune(base, tmp_path_factory.mktemp("finetuned") / "finetuned")


def compress(base: Path, finetuned: Path, out: Path, **options: object) -> Manifest:
    return compress_checkpoint(base, finetuned, out.as_uri(), CompressOptions.model_validate(SMALL | options))


def edit(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint whose tensors were changed."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def reconstructed(base: Path, artifact: Path) -> dict[str, Tensor]:
    """Base + delta in float32, straight from the manifest and the kernels' ``unpack``."""
    manifest, store = open_artifact(artifact)
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    grown: dict[str, Tensor] = {}
    for blob in manifest.blobs:
        tensors = read_blob(read_verified(store, blob_key(blob.object_digest), blob), blob)
        for name, entry in blob.tensors.items():
            if name.endswith(".added"):
                grown[name.removesuffix(".added")] = tensors[name].float()
            elif entry.codec == "raw":
                weights[name] = tensors[name].float()
            else:
                shape = (entry.shape[0], entry.shape[1])
                packed = {key: tensors[f"{name}.{key}"] for key in packed_layout(entry.codec, shape)}
                weights[name] += unpack(entry.codec, packed, shape)
    return weights | {name: torch.cat([weights[name], rows]) for name, rows in grown.items()}


def check_round_trip(base: Path, artifact: Path, out: Path) -> dict[str, Tensor]:
    """What transformers loads from the merged checkpoint is base + delta, to the bit; returns it."""
    merge(base, artifact, out, dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    loaded = model.state_dict()
    expected = reconstructed(base, artifact)
    for name, weight in expected.items():
        assert torch.equal(loaded[name], weight), name
    assert loaded.keys() - expected.keys() <= {HEAD}
    return expected


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_round_trips(base: Path, finetuned: Path, tmp_path: Path, codec: str) -> None:
    manifest = compress(base, finetuned, tmp_path / "artifact", codec=codec)
    opened, store = open_artifact(tmp_path / "artifact")
    verify_artifact(opened, store)
    assert opened == manifest
    assert [blob.block for blob in manifest.blobs] == ["layers.0", "layers.1", "outer"]
    assert manifest.base.digest == base_digest(Checkpoint.open(base))
    for blob in manifest.blobs:
        for name, entry in blob.tensors.items():
            matrix_codec = "int4" if blob.block == "outer" else codec
            assert entry.codec == ("raw" if "norm" in name else matrix_codec)
    weights = check_round_trip(base, tmp_path / "artifact", tmp_path / "merged")
    target = load_file(finetuned / "model.safetensors")
    start = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        assert (weight - target[name]).norm() < (start[name] - target[name]).norm()


def test_more_bits_are_nearer_to_the_finetune(base: Path, finetuned: Path, tmp_path: Path) -> None:
    found = {codec: compress(base, finetuned, tmp_path / codec, codec=codec) for codec in ("int4", "int2", "int1")}
    divergences = [manifest.quality.kl_divergence for manifest in found.values() if manifest.quality]
    assert divergences == sorted(divergences)
    sizes = [manifest.bytes_artifact for manifest in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    quality = found["int4"].quality
    assert quality is not None
    assert quality.data == "8 sequences sampled from the fine-tune, seed 0"
    assert 0 < quality.block_errors["layers.0"] < quality.block_errors["layers.1"] < 0.5
    for blob in found["int4"].blobs:
        assert all((entry.relative_error is None) == (entry.codec == "raw") for entry in blob.tensors.values())


def test_a_delta_on_the_grid_loses_nothing(base: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)

    def on_grid(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                codes = torch.randint(0, 16, tensor.shape, generator=generator)
                codes[:, ::128] = 0
                # A power of two far above the base's rounding, so that base + delta - base is the delta.
                tensors[name] = tensor.bfloat16().float() + (codes - 8) * 2**-8

    def coarse(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                tensors[name] = tensor.bfloat16().float()

    finetuned = edit(base, tmp_path / "finetuned", on_grid)
    start = edit(base, tmp_path / "base", coarse)
    manifest = compress(start, finetuned, tmp_path / "artifact")
    assert manifest.quality is not None
    assert manifest.quality.block_errors == {"layers.0": 0.0, "layers.1": 0.0}
    assert manifest.quality.kl_divergence == pytest.approx(0, abs=1e-7)
    merge(start, tmp_path / "artifact", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in load_file(finetuned / "model.safetensors").items():
        assert torch.equal(merged[name], weight), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_added_tokens_and_tied_embeddings(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", tied=tied, layers=1)
    finetuned = make_finetune(base, tmp_path / "finetuned", added=("<new>", "<newer>"), template="{{ messages }}")
    manifest = compress(base, finetuned, tmp_path / "artifact")
    vocab = len(make_tokenizer())
    assert (manifest.base.vocab_size, manifest.added_tokens) == (vocab, 2)
    outer = next(blob for blob in manifest.blobs if blob.block == "outer")
    matrices = {EMBEDDING} if tied else {EMBEDDING, HEAD}
    assert outer.tensors.keys() == {*matrices, *(f"{name}.added" for name in matrices), "model.norm.weight"}
    assert outer.tensors[EMBEDDING].shape == (vocab, 128)
    weights = check_round_trip(base, tmp_path / "artifact", tmp_path / "merged")
    target = load_file(finetuned / "model.safetensors")
    assert torch.equal(weights[EMBEDDING][vocab:], target[EMBEDDING][vocab:])
    assert manifest.files.keys() >= {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (finetuned / name).read_bytes()
    assert manifest.bytes_finetuned == sum(target[name].nbytes for name in target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sharded_checkpoints(base: Path, finetuned: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    for source, name in ((base, "base"), (finetuned, "finetuned")):
        model = LlamaForCausalLM.from_pretrained(source, dtype=dtype)
        model.save_pretrained(tmp_path / name, max_shard_size="300KB")
        assert (tmp_path / name / "model.safetensors.index.json").is_file()
        make_tokenizer().save_pretrained(tmp_path / name)
    manifest = compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "artifact")
    norms = [e for blob in manifest.blobs for n, e in blob.tensors.items() if "norm" in n]
    assert norms
    assert all(entry.bytes_finetuned == 2 * entry.shape[0] for entry in norms)
    merge(tmp_path / "base", tmp_path / "artifact", tmp_path / "merged")
    merge(tmp_path / "base", tmp_path / "artifact", tmp_path / "exact", dtype=torch.float32)
    merged, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "exact"))
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == dtype
    assert json.loads((tmp_path / "exact" / "config.json").read_text())["dtype"] == "float32"
    for name, weight in exact.items():
        assert torch.equal(weight.to(dtype), merged[name])


def test_what_did_not_change_is_absent(base: Path, finetuned: Path, tmp_path: Path) -> None:
    original = load_file(base / "model.safetensors")

    def freeze(tensors: dict[str, Tensor]) -> None:
        tuned = ("model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight")
        tensors.update({name: tensor for name, tensor in original.items() if name not in tuned})

    manifest = compress(base, edit(finetuned, tmp_path / "partly", freeze), tmp_path / "artifact")
    assert [blob.block for blob in manifest.blobs] == ["layers.1"]
    assert manifest.blobs[0].tensors.keys() == {
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert manifest.quality is not None
    assert manifest.quality.block_errors["layers.0"] == 0
    assert manifest.quality.block_errors["layers.1"] > 0
    check_round_trip(base, tmp_path / "artifact", tmp_path / "merged")


def test_the_base_itself_is_an_empty_delta(base: Path, tmp_path: Path) -> None:
    manifest = compress(base, base, tmp_path / "artifact")
    assert manifest.blobs == ()
    assert manifest.quality is not None
    assert manifest.quality.kl_divergence == 0
    check_round_trip(base, tmp_path / "artifact", tmp_path / "merged")


def test_two_runs_make_one_version(base: Path, finetuned: Path, tmp_path: Path) -> None:
    first, second = (compress(base, finetuned, tmp_path / name, codec="int2") for name in ("first", "second"))
    assert first.version() == second.version()
    assert compress(base, finetuned, tmp_path / "third", codec="int2", seed=1).version() != first.version()


def test_blobs_do_not_depend_on_sharding(base: Path, finetuned: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(finetuned, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    whole = compress(base, finetuned, tmp_path / "whole")
    sharded = compress(base, tmp_path / "sharded", tmp_path / "parts")
    assert sharded.blobs == whole.blobs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", [EMBEDDING, "model.layers.1.self_attn.o_proj.weight", "model.layers.0.input_layernorm.weight", HEAD]
)
def test_a_broken_weight_is_named(base: Path, finetuned: Path, tmp_path: Path, name: str, value: float) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 20)
    broken = edit(finetuned, tmp_path / "broken", poison)
    for arguments in ((base, broken), (broken, finetuned)):
        with pytest.raises(CheckpointInvalid, match=f"broken: {name} holds NaN or Inf"):
            compress(*arguments, tmp_path / "artifact", calibration=text)
    assert not (tmp_path / "artifact" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ("model.layers.0.mlp.up_proj.weight", r"the inputs of model\.layers\.0\.mlp\.down_proj"),
        ("model.layers.1.mlp.down_proj.weight", "the outputs of block 1"),
        (HEAD, "the outputs of the head"),
    ],
)
def test_overflow_is_reported_where_it_happens(
    base: Path, finetuned: Path, tmp_path: Path, weight: str, where: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 20)
    large = edit(finetuned, tmp_path / "large", lambda tensors: tensors[weight].mul_(2e5))
    with pytest.raises(CompressionError, match=f"{where} overflow on the calibration data"):
        compress(base, large, tmp_path / "artifact", calibration=text, dtype="float16")
    assert compress(base, large, tmp_path / "artifact", calibration=text).quality is not None


def test_progress_runs_from_zero_to_one(base: Path, finetuned: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    options = CompressOptions.model_validate(SMALL)
    out = (tmp_path / "artifact").as_uri()
    compress_checkpoint(base, finetuned, out, options, lambda what, done: seen.append((what, done)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert seen[-1] == ("done", 1.0)
    assert {"block 1 of 2", "block 2 of 2"} <= {what for what, _ in seen}


def test_merge_refuses_another_base_and_an_existing_folder(base: Path, finetuned: Path, tmp_path: Path) -> None:
    compress(base, finetuned, tmp_path / "artifact")
    with pytest.raises(BaseMismatch, match="give the base that it was compressed against"):
        merge(make_base(tmp_path / "other", seed=9), tmp_path / "artifact", tmp_path / "merged")
    with pytest.raises(ConfigError, match="exists already"):
        merge(base, tmp_path / "artifact", base)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .* free space, or give another folder"):
        merge(base, tmp_path / "artifact", tmp_path / "file" / "merged")


def test_merge_verifies_blobs_and_leaves_nothing_half_done(base: Path, finetuned: Path, tmp_path: Path) -> None:
    manifest = compress(base, finetuned, tmp_path / "artifact")
    path = tmp_path / "artifact" / blob_key(manifest.blobs[1].object_digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BlobCorrupt):
        merge(base, tmp_path / "artifact", tmp_path / "merged")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["artifact"]


def test_a_merged_checkpoint_may_have_shards(
    base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(base, finetuned, tmp_path / "artifact")
    monkeypatch.setattr("deltazip_ray.compress.merge.SHARD_BYTES", 400_000)
    check_round_trip(base, tmp_path / "artifact", tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
