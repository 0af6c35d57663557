"""The digest of a base is remembered as long as nothing of the base changes, and never believed longer."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltazip_ray.artifact import digest_cache
from deltazip_ray.artifact.checkpoint import Checkpoint, base_digest
from deltazip_ray.artifact.digest_cache import known_base_digest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"model.norm.weight": torch.ones(8)}, folder / "model.safetensors")
    return folder


class Look:
    """Counts how often a base is hashed. Its files look old, and the cache is one of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.hashed = 0
        self.folder = folder
        self.later_ns = 10_000_000_000

        def counted(checkpoint: Checkpoint) -> str:
            self.hashed += 1
            return base_digest(checkpoint)

        now = time.time_ns
        monkeypatch.setattr(digest_cache, "base_digest", counted)
        monkeypatch.setattr(time, "time_ns", lambda: now() + self.later_ns)

    def __call__(self, base: Path, small: int = 0) -> str:
        return known_base_digest(Checkpoint.open(base), self.folder, small)


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Look:
    return Look(monkeypatch, tmp_path / "cache" / "bases")


def test_a_base_is_hashed_once(look: Look, base: Path) -> None:
    assert [look(base) for _ in range(3)] == [base_digest(Checkpoint.open(base))] * 3
    assert look.hashed == 1


def test_whatever_changes_the_digest_is_noticed(look: Look, base: Path, tmp_path: Path) -> None:
    seen = {look(base)}
    stat = (base / "model.safetensors").stat()
    save_file({"model.norm.weight": torch.zeros(8)}, base / "model.safetensors")
    os.utime(base / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    seen.add(look(base))
    (base / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 16}))
    seen.add(look(base))
    assert (len(seen), look.hashed) == (3, 3)
    assert look(base) in seen
    assert look.hashed == 3


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"a" * 63, b"g" * 64])
def test_a_damaged_entry_is_not_believed(look: Look, base: Path, damage: bytes) -> None:
    right = look(base)
    (entry,) = look.folder.iterdir()
    entry.write_bytes(damage)
    assert look(base) == right == look(base)
    assert look.hashed == 2


def test_what_may_still_change_is_not_remembered(look: Look, base: Path) -> None:
    look.later_ns = 0
    assert look(base) == look(base)
    assert look.hashed == 2


def test_small_bases_and_a_cache_that_cannot_be_written_are_hashed(look: Look, base: Path, tmp_path: Path) -> None:
    look(base, small=1 << 30)
    assert not look.folder.exists()
    look.folder.parent.write_text("in the way")
    assert look(base) == look(base)
    assert look.hashed == 3
