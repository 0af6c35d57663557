import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltazip_ray.artifact.checkpoint import Checkpoint, base_digest
from deltazip_ray.errors import CheckpointInvalid
from tests.support.tiny import make_base, make_finetune


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("checkpoint") / "base", hidden=32)


@pytest.fixture
def base(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "base"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def shard(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{i % 3}.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, where in weight_map.items() if where == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_contents(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    tensors = load_file(base / "model.safetensors")
    assert checkpoint.names == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tensor.shape
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.config["hidden_size"] == 32
    assert checkpoint.files["tokenizer.json"] == base / "tokenizer.json"
    assert "added_tokens.json" not in checkpoint.files


def test_shards_read_as_one(base: Path, pristine: Path) -> None:
    shard(base)
    whole, sharded = Checkpoint.open(pristine), Checkpoint.open(base)
    assert sharded.names == whole.names
    assert all(torch.equal(sharded.tensor(name), whole.tensor(name)) for name in whole.names)
    assert base_digest(sharded) == base_digest(whole)


def test_unknown_tensor(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    for ask in (checkpoint.tensor, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(CheckpointInvalid, match=r"no tensor lm_foot"):
            ask("lm_foot")


def test_progress_adds_up(base: Path) -> None:
    checkpoint, seen = Checkpoint.open(base), []
    assert base_digest(checkpoint, seen.append) == base_digest(checkpoint)
    assert sum(seen) == checkpoint.nbytes
    assert len(seen) == len(checkpoint.names)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(transformers_version="9.9", use_cache=False, _name_or_path="x", eos_token_id=1, dtype="x"),
        lambda c: c.update(head_dim=c["hidden_size"] // c["num_attention_heads"]),
        lambda c: c.pop("head_dim", None),
        lambda c: c.pop("attention_bias", None),
        lambda c: c.update(rope_theta=c.pop("rope_parameters")["rope_theta"], rope_scaling=None),
    ],
)
def test_the_digest_ignores_spelling(base: Path, change: Callable[[dict[str, Any]], object]) -> None:
    before = base_digest(Checkpoint.open(base))
    edit(base / "config.json", change)
    assert base_digest(Checkpoint.open(base)) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(rms_norm_eps=0.5),
        lambda c: c.update(tie_word_embeddings=True),
        lambda c: c.update(num_key_value_heads=4),
        lambda c: c["rope_parameters"].update(rope_theta=5e5),
        lambda c: c["rope_parameters"].update(rope_type="llama3", factor=8.0),
        lambda c: c.update(hidden_act="gelu"),
        lambda c: c.update(sliding_window=16),
    ],
)
def test_the_digest_follows_the_architecture(base: Path, change: Callable[[dict[str, Any]], object]) -> None:
    before = base_digest(Checkpoint.open(base))
    edit(base / "config.json", change)
    assert base_digest(Checkpoint.open(base)) != before


def test_the_digest_follows_every_weight(base: Path, tmp_path: Path) -> None:
    before = base_digest(Checkpoint.open(base))
    assert base_digest(Checkpoint.open(make_finetune(base, tmp_path / "tuned"))) != before
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, base / "model.safetensors")
    assert base_digest(Checkpoint.open(base)) != before


def test_the_digest_tells_dtypes_and_names_apart(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    digests = {base_digest(Checkpoint.open(base))}
    save_file({name: tensor.view(torch.int32) for name, tensor in tensors.items()}, base / "model.safetensors")
    digests.add(base_digest(Checkpoint.open(base)))
    save_file({name + "x": tensor for name, tensor in tensors.items()}, base / "model.safetensors")
    digests.add(base_digest(Checkpoint.open(base)))
    assert len(digests) == 3


def without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def pickled(path: Path) -> None:
    without_weights(path)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"evil": 1}))


def index(path: Path, weight_map: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def quantized(path: Path) -> None:
    save_file({"w": torch.zeros(8, dtype=torch.float8_e4m3fn)}, path / "model.safetensors")


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "not a folder"),
    "no config": (lambda p: (p / "config.json").unlink(), "has no config"),
    "config no JSON": (lambda p: (p / "config.json").write_text("{"), "cannot read"),
    "config nested": (lambda p: (p / "config.json").write_text("[" * 100_000), "cannot read"),
    "config no object": (lambda p: (p / "config.json").write_text("[]"), "not a JSON object"),
    "custom code": (lambda p: edit(p / "config.json", lambda c: c.update(auto_map={"A": "m.A"})), "code of its own"),
    "tokenizer code": (lambda p: edit(p / "tokenizer_config.json", lambda c: c.update(auto_map={"A": "m.A"})), "code"),
    "no weights": (without_weights, "neither model.safetensors"),
    "pickles": (pickled, "pickled weights"),
    "quantized": (quantized, "only unquantized"),
    "truncated": (lambda p: (p / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{"), "not a safetensors file"),
    "huge header": (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 16), "not a safetensors file"),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), "not a safetensors file"),
    "a pickle in disguise": (lambda p: (p / "model.safetensors").write_bytes(pickle.dumps([1])), "not a safetensors"),
    "index empty": (lambda p: index(p, {}), "no weight_map"),
    "index no object": (lambda p: index(p, ["x"]), "no weight_map"),
    "index escapes": (lambda p: index(p, {"w": "../base/model.safetensors"}), "names no shard"),
    "index absolute": (lambda p: index(p, {"w": "/etc/passwd.safetensors"}), "names no shard"),
    "index of pickles": (lambda p: index(p, {"w": "model.bin"}), "names no shard"),
    "index of numbers": (lambda p: index(p, {"w": 3}), "names no shard"),
    "shard missing": (lambda p: index(p, {"w": "model-7.safetensors"}), "but missing"),
    "tensor missing": (lambda p: index(p, {"w": "model.safetensors"}), "has no w"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_and_hostile_checkpoints(base: Path, kind: str) -> None:
    change, message = BREAKS[kind]
    change(base)
    with pytest.raises(CheckpointInvalid, match=message):
        Checkpoint.open(base)


@pytest.mark.parametrize("half", [0.3, 0.999])
def test_truncated_weights(base: Path, half: float) -> None:
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[: int(len(data) * half)])
    with pytest.raises(CheckpointInvalid):
        Checkpoint.open(base)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("hidden_size"),
        lambda c: c.update(num_attention_heads=0),
        lambda c: c.update(num_attention_heads="4"),
        lambda c: c.update(rope_parameters=[1]),
        lambda c: c["rope_parameters"].update(rope_theta="x"),
    ],
)
def test_configurations_without_an_architecture(base: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(base / "config.json", change)
    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        base_digest(Checkpoint.open(base))
