"""The goals of ``deltazip compress`` on the command line, and what ``inspect`` tells of them."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.command import deltazip
from tests.support.tiny import make_base, make_finetune


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("command")
    base = make_base(folder / "base")
    return ("compress", base, make_finetune(base, folder / "tuned"), "--samples", 8, "--sequence-length", 24, "--out")


@pytest.mark.parametrize(
    "goal", [("--target-bits", "2.5"), ("--target-ratio", "10"), ("--max-error", "1.5%"), ("--max-error", "0.015")]
)
def test_goals_mix_codecs_and_inspect_shows_them(
    command: tuple[object, ...], tmp_path: Path, goal: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, printed, noted = deltazip(*command, tmp_path / "delta", *goal, "--json")
    assert code == 0
    assert "no --calibration, so the fine-tune wrote its own" in noted
    told = json.loads(printed)
    codecs = {entry["codec"] for blob in told["blobs"] for entry in blob["tensors"].values()}
    assert len(codecs - {"raw"}) > 1
    assert told["bits"].keys() == {blob["block"] for blob in told["blobs"]}
    shown = deltazip("inspect", tmp_path / "delta")[1]
    for block, bits in told["bits"].items():
        assert any(line.split()[1:2] == [block] and f" {bits:.2f} " in line for line in shown.splitlines()), shown
    if goal[0] == "--max-error":
        errors = [entry["relative_error"] or 0 for blob in told["blobs"] for entry in blob["tensors"].values()]
        assert max(errors) <= 0.015


@pytest.mark.parametrize(
    ("goal", "hint"),
    [
        (("--codec", "int2", "--target-bits", "2"), "codec and target_bits contradict each other: give one of them"),
        (("--target-ratio", "0"), "target_ratio: Input should be greater than 0"),
        (("--max-error", "much"), "write 0.5% or 0.005"),
        (("--target-ratio", "9999"), "ask for a lower one"),
        (("--require", "loss<1"), "write kl<0.05, block<2% or"),
        pytest.param(
            ("--device", "cuda"),
            "torch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_goals_that_make_no_sense(
    command: tuple[object, ...], tmp_path: Path, goal: tuple[str, ...], hint: str
) -> None:
    code, _, told = deltazip(*command, tmp_path / "delta", *goal)
    assert code != 0
    assert hint in told
    assert "Traceback" not in told


def test_an_artifact_is_replaced_only_when_asked(command: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "delta"
    assert deltazip(*command, out, "--codec", "int2")[0] == 0
    before = (out / "manifest.json").read_bytes()
    code, _, told = deltazip(*command, out, "--codec", "int4")
    assert code == 1
    assert "already has an artifact" in told
    assert (out / "manifest.json").read_bytes() == before
    assert deltazip(*command, out, "--codec", "int4", "--force")[0] == 0
    assert (out / "manifest.json").read_bytes() != before
