"""Codecs chosen matrix by matrix: targets are met, and the choice is worth it."""

import math
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from deltazip_kernels.layout import ROWS as TILE
from deltazip_ray.artifact.manifest import Manifest, TensorEntry
from deltazip_ray.compress import vocabulary
from deltazip_ray.compress.calibration import load_calibration
from deltazip_ray.compress.choices import Survey
from deltazip_ray.compress.merge import merge
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import open_pair
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import Skeleton
from deltazip_ray.compress.survey import Surveyor
from deltazip_ray.errors import CompressionError
from tests.support.tiny import make_base, make_finetune

SMALL = {"samples": 24, "sequence_length": 32}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LOUD = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def finetuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune that moved one matrix of the last block much further than all others."""
    path = make_finetune(base, tmp_path_factory.mktemp("finetuned") / "finetuned", scale=0.005)
    start = load_file(base / "model.safetensors")
    tensors = load_file(path / "model.safetensors")
    tensors[LOUD] = start[LOUD] + 12 * (tensors[LOUD] - start[LOUD])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def compress(base: Path, finetuned: Path, out: Path, **options: object) -> Manifest:
    return compress_checkpoint(base, finetuned, out.as_uri(), CompressOptions.model_validate(SMALL | options))


def kl(manifest: Manifest) -> float:
    assert manifest.quality is not None
    assert manifest.quality.kl_divergence is not None
    return manifest.quality.kl_divergence


def entries(manifest: Manifest) -> dict[str, TensorEntry]:
    return {name: entry for blob in manifest.blobs for name, entry in blob.tensors.items()}


def survey(base: Path, finetuned: Path) -> Survey:
    options = CompressOptions.model_validate(SMALL)
    pair = open_pair(base, finetuned)
    with torch.no_grad():
        calibration = load_calibration(pair.finetuned, pair.skeleton, options, lambda fraction: None)
        runner = Runner(pair.skeleton, calibration, options)
        return Surveyor(pair, runner, calibration, options).survey(lambda fraction: None)


def test_equal_bytes_lose_less_when_they_go_where_they_matter(base: Path, finetuned: Path, tmp_path: Path) -> None:
    uniform = compress(base, finetuned, tmp_path / "uniform", codec="int2", outer_codec="int2")
    numbers = LlamaForCausalLM.from_pretrained(finetuned).num_parameters()
    ratio = 2 * numbers / uniform.bytes_artifact
    chosen = compress(base, finetuned, tmp_path / "chosen", target_ratio=ratio)
    assert chosen.bytes_artifact <= uniform.bytes_artifact
    assert kl(chosen) < 0.7 * kl(uniform)
    assert entries(chosen)[LOUD].codec in {"int3", "int4", "raw"}


def test_one_block_is_alive_at_a_time(
    base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Skeleton.part
    made: list[weakref.ref[nn.Module]] = []

    def counted(skeleton: Skeleton, name: str, weights: dict[str, Tensor]) -> nn.Module:
        if ".layers." not in name:
            return part(skeleton, name, weights)
        assert not any(block() for block in made)
        block = part(skeleton, name, weights)
        made.append(weakref.ref(block))
        return block

    monkeypatch.setattr(Skeleton, "part", counted)
    compress(base, finetuned, tmp_path / "out", target_ratio=8)
    assert len(made) == 2 * 4  # fine-tune forth and back, base and fine-tune while coding


@pytest.mark.parametrize("ratio", [5.0, 12.0])
def test_a_ratio_is_met_and_made_use_of(base: Path, finetuned: Path, tmp_path: Path, ratio: float) -> None:
    manifest = compress(base, finetuned, tmp_path / "artifact", target_ratio=ratio)
    numbers = LlamaForCausalLM.from_pretrained(finetuned).num_parameters()
    assert ratio <= 2 * numbers / manifest.bytes_artifact < 1.1 * ratio


def test_bits_count_changed_matrices_only(base: Path, finetuned: Path, tmp_path: Path) -> None:
    partly = tmp_path / "partly"
    partly.mkdir()
    for file in finetuned.iterdir():
        (partly / file.name).write_bytes(file.read_bytes())
    start = load_file(base / "model.safetensors")
    kept = {
        name: tensor if ".layers.1.mlp" in name else start[name]
        for name, tensor in load_file(finetuned / "model.safetensors").items()
    }
    save_file(kept, partly / "model.safetensors", metadata={"format": "pt"})
    manifest = compress(base, partly, tmp_path / "artifact", target_bits=3.0)
    assert [blob.block for blob in manifest.blobs] == ["layers.1"]
    weights = sum(tensor.numel() for name, tensor in kept.items() if ".layers.1.mlp" in name)
    assert 2.2 < 8 * manifest.bytes_artifact / weights <= 3.0


def test_fewer_bits_lose_more_and_equal_ones_give_one_version(base: Path, finetuned: Path, tmp_path: Path) -> None:
    found = [compress(base, finetuned, tmp_path / str(bits), target_bits=bits) for bits in (4.5, 2.0, 1.0)]
    assert [manifest.bytes_artifact for manifest in found] == sorted((m.bytes_artifact for m in found), reverse=True)
    assert [kl(manifest) for manifest in found] == sorted(kl(manifest) for manifest in found)
    seen: list[tuple[str, float]] = []
    options = CompressOptions.model_validate(SMALL | {"target_bits": 2.0})
    again = compress_checkpoint(
        base, finetuned, tmp_path.as_uri(), options, lambda what, done: seen.append((what, done))
    )
    assert again.version() == found[1].version()
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert "sensitivity of each matrix" in {what for what, _ in seen}


@pytest.mark.parametrize("limit", [0.03, 0.004])
def test_the_largest_error_is_kept_by_every_matrix(base: Path, finetuned: Path, tmp_path: Path, limit: float) -> None:
    manifest = compress(base, finetuned, tmp_path / "artifact", max_error=limit)
    found = entries(manifest)
    measured = [entry.relative_error for entry in found.values() if entry.relative_error is not None]
    assert measured
    assert max(measured) <= limit
    codecs = {entry.codec for name, entry in found.items() if "norm" not in name}
    assert len(codecs) > 1
    merge(base, tmp_path / "artifact", tmp_path / "merged", dtype=torch.float32)
    target, merged = (load_file(path / "model.safetensors") for path in (finetuned, tmp_path / "merged"))
    for name, entry in found.items():
        if entry.codec == "raw":
            assert torch.equal(merged[name], target[name])


def test_what_hardly_changed_costs_nothing(base: Path, tmp_path: Path) -> None:
    nearly = make_finetune(base, tmp_path / "nearly", scale=1e-5)
    manifest = compress(base, nearly, tmp_path / "artifact", max_error=0.005)
    assert all("norm" in name for name in entries(manifest))
    assert 0 < kl(manifest) < 1e-4


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_in_pieces_is_the_same_vocabulary(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 2 * TILE - 3)))
    start = make_base(tmp_path / "base", tied=tied, layers=1, alphabet=letters)
    tuned = make_finetune(start, tmp_path / "tuned", added=("<a>", "<b>"))
    head, found = EMBEDDING if tied else HEAD, []
    for rows in (vocabulary.ROWS, TILE):
        monkeypatch.setattr(vocabulary, "ROWS", rows)
        manifest = compress(start, tuned, tmp_path / f"of {rows}", outer_codec="int2")
        errors = [entries(manifest)[name].relative_error for name in {EMBEDDING, head}]
        # Draws of tokens, and so the costs of lookups, depend on the pieces.
        costs = [] if tied else [choice.cost for choice in survey(start, tuned).choices[head]]
        found.append([kl(manifest), *errors, *costs])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_predicted_costs_are_those_that_come(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    finetuned = make_finetune(base, tmp_path / "finetuned", scale=0.01, added=("<new>",))
    choices = survey(base, finetuned).choices
    assert (HEAD in choices) is not tied
    exact = dict.fromkeys(choices, "raw")
    looked_at = [EMBEDDING, "model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    for name in looked_at if tied else [*looked_at, HEAD]:
        for coding in ("absent", "int2"):
            alone = compress(base, finetuned, tmp_path / f"{name}-{coding}", codecs=exact | {name: coding})
            predicted = next(choice.cost for choice in choices[name] if choice.coding == coding)
            assert abs(math.log(predicted / kl(alone))) < math.log(4), (name, coding)


def test_every_coding_of_the_embedding_merges_with_added_rows(base: Path, tmp_path: Path) -> None:
    grown = make_finetune(base, tmp_path / "grown", added=("<new>", "<newer>"))
    target = load_file(grown / "model.safetensors")
    for coding in ("absent", "int3", "raw"):
        compress(base, grown, tmp_path / coding, codecs={EMBEDDING: coding, HEAD: coding})
        merge(base, tmp_path / coding, tmp_path / f"{coding}-merged", dtype=torch.float32)
        merged = load_file(tmp_path / f"{coding}-merged" / "model.safetensors")
        for name in (EMBEDDING, HEAD):
            assert merged[name].shape == target[name].shape
            assert torch.equal(merged[name][-2:], target[name][-2:])
            assert torch.equal(merged[name], target[name]) is (coding == "raw")


def test_rows_of_the_vocabulary_that_did_not_change_stay_exact(base: Path, tmp_path: Path) -> None:
    finetuned = make_finetune(base, tmp_path / "finetuned")
    start, tensors = load_file(base / "model.safetensors"), load_file(finetuned / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        tensors[name][10:60] = start[name][10:60]
    save_file(tensors, finetuned / "model.safetensors", metadata={"format": "pt"})
    compress(base, finetuned, tmp_path / "artifact", codecs={EMBEDDING: "int2", HEAD: "int2"})
    merge(base, tmp_path / "artifact", tmp_path / "merged", dtype=torch.float32)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(merged[name][10:60], start[name][10:60])
        assert not torch.equal(merged[name][:10], start[name][:10])


def test_targets_that_cannot_be_met(base: Path, finetuned: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="more than a ratio of 5000 allows: ask for a lower one"):
        compress(base, finetuned, tmp_path / "artifact", target_ratio=5000)
    with pytest.raises(CompressionError, match=r"codecs names model\.norm\.weight, which is not a matrix"):
        compress(base, finetuned, tmp_path / "artifact", codecs={"model.norm.weight": "int4"})
    assert not (tmp_path / "artifact" / "manifest.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "int2", "target_bits": 2},
        {"target_ratio": 3, "max_error": 0.1},
        {"outer_codec": "int4", "max_error": 0.1},
    ],
)
def test_one_goal_at_a_time(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="contradict each other"):
        CompressOptions.model_validate(options)
