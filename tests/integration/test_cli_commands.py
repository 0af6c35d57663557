"""The commands as a user types them: compress, inspect, merge, publish, variants."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM

from deltazip_ray.cli.app import app
from deltazip_ray.cli.console import run
from tests.support.tiny import make_base, make_finetune


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


def deltazip(*args: object, ok: bool = True) -> Done:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        run(lambda: app(list(map(str, args))))
    done = Done(ended.value.code or 0, stdout.getvalue(), stderr.getvalue())
    assert (done.code == 0) is ok, done.stderr
    return done


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune and its compressed artifact."""
    folder = tmp_path_factory.mktemp("cli")
    base = make_base(folder / "base")
    tuned = make_finetune(base, folder / "tuned", added=("<tool>",))
    deltazip("compress", base, tuned, "--out", folder / "delta", "--samples", 8, "--sequence-length", 32)
    return folder


def test_cli_inspect_tells_sizes_and_verifies(folder: Path) -> None:
    told = json.loads(deltazip("inspect", folder / "delta", "--verify", "--json").stdout)
    assert told["ratio"] == pytest.approx(told["bytes_finetuned"] / told["bytes_artifact"], abs=0.01)
    assert told["added_tokens"] == 1
    shown = deltazip("inspect", folder / "delta", "--verify").stdout
    assert told["version"] in shown
    assert "layers.1" in shown


def test_cli_inspect_names_the_broken_blob(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "delta", tmp_path / "broken")
    blob = max((tmp_path / "broken" / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    failed = deltazip("inspect", tmp_path / "broken", "--verify", ok=False)
    assert failed.code == 1
    assert blob.name[:12] in failed.stderr
    assert "make the artifact again" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_cli_merge_writes_what_transformers_loads(folder: Path) -> None:
    deltazip("merge", folder / "base", folder / "delta", "--out", folder / "merged")
    merged = LlamaForCausalLM.from_pretrained(folder / "merged")
    tuned = LlamaForCausalLM.from_pretrained(folder / "tuned")
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    name = "model.layers.0.mlp.down_proj.weight"
    moved = tuned.state_dict()[name] - base.state_dict()[name]
    error = merged.state_dict()[name] - tuned.state_dict()[name]
    assert merged.config.vocab_size == tuned.config.vocab_size
    assert torch.linalg.norm(error) < 0.2 * torch.linalg.norm(moved)


def test_cli_merge_does_not_overwrite(folder: Path) -> None:
    failed = deltazip("merge", folder / "base", folder / "delta", "--out", folder / "tuned", ok=False)
    assert "exists already" in failed.stderr


def test_cli_publish_alias_and_remove(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert f"store.url: {store.as_uri()}\n" in deltazip("publish", folder / "delta", store, "--name", "sorter").stdout
    other = deltazip(
        "publish", folder / "delta", store, "--name", "other", "--alias", "canary", "--alias", "prod", "--json"
    )
    assert json.loads(other.stdout)["aliases"] == ["canary", "prod"]
    listed = json.loads(deltazip("variants", "ls", store, "--json").stdout)
    by_name = {variant["name"]: variant for variant in listed["variants"]}
    assert set(by_name["sorter"]["aliases"]) == {"latest"}
    assert set(by_name["other"]["aliases"]) == {"canary", "prod"}

    version = by_name["sorter"]["versions"][0]
    deltazip("variants", "alias", store, f"sorter@{version[:12]}", "stable")
    assert version[:12] in deltazip("variants", "ls", store).stdout
    deltazip("variants", "rm", store, "other")
    assert "other" not in deltazip("variants", "ls", store).stdout


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("publish", "{folder}/delta", "{folder}/store", "--name", "../evil"), "letters, digits"),
        (("publish", "{folder}/nothing", "{folder}/store", "--name", "x"), "no folder"),
        (("publish", "{folder}/base", "{folder}/store", "--name", "x"), "manifest.json"),
        (("variants", "ls", "{folder}/nothing"), "publish"),
        (("compress", "{folder}/delta", "{folder}/tuned", "--out", "{folder}/x"), "config.json"),
        (("inspect", "http://example"), "s3://"),
        (("variants", "ls", "s3://"), "s3:// URL"),
        (("variants", "ls", "file://"), "file:// URL"),
    ],
)
def test_cli_errors_are_one_line_that_helps(folder: Path, args: tuple[str, ...], hint: str) -> None:
    failed = deltazip(*(arg.format(folder=folder) for arg in args), ok=False)
    assert hint in failed.stderr
    assert "Traceback" not in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_cli_tells_its_version() -> None:
    assert deltazip("--version").stdout.startswith("deltazip 0.")
