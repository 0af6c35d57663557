"""A compression that broke off goes on where it was, and gives the version that it would have given."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from deltazip_ray.artifact.artifact import open_artifact, verify_artifact
from deltazip_ray.artifact.manifest import Manifest, blob_key
from deltazip_ray.compress.blocks import BlockCompressor
from deltazip_ray.compress.options import CompressOptions, Progress, silent
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.compress.survey import Surveyor
from deltazip_ray.errors import QualityTooLow
from tests.support.tiny import make_base, make_finetune

SMALL = {"samples": 8, "sequence_length": 24, "codec": "int2"}


class Killed(BaseException):
    """As abrupt as Ctrl-C."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", layers=3)


@pytest.fixture(scope="module")
def finetuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finetune(base, tmp_path_factory.mktemp("finetuned") / "finetuned")


@pytest.fixture
def coded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was computed and not found: numbers of blocks, and "survey"."""
    done: list[object] = []
    compress, survey = BlockCompressor.compress, Surveyor.survey

    def counted(self: BlockCompressor, index: int, states: object) -> object:
        done.append(index)
        return compress(self, index, states)  # type: ignore[arg-type]

    def surveyed(self: Surveyor, progress: Callable[[float], None]) -> object:
        done.append("survey")
        return survey(self, progress)

    monkeypatch.setattr(BlockCompressor, "compress", counted)
    monkeypatch.setattr(Surveyor, "survey", surveyed)
    return done


def compress(
    base: Path, finetuned: Path, out: Path, progress: Progress = silent, options: Mapping[str, object] = SMALL
) -> Manifest:
    return compress_checkpoint(base, finetuned, out.as_uri(), CompressOptions.model_validate(options), progress)


@pytest.fixture(scope="module")
def whole(base: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """What a run makes that nobody interrupts."""
    return compress(base, finetuned, tmp_path_factory.mktemp("whole"))


def break_off(base: Path, finetuned: Path, out: Path, at: str, options: Mapping[str, object] = SMALL) -> None:
    def progress(what: str, done: float) -> None:
        if what == at:
            raise Killed

    with pytest.raises(Killed):
        compress(base, finetuned, out, progress, options)
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize(("at", "left"), [("block 2 of 3", [1, 2]), ("block 3 of 3", [2]), ("head and quality", [])])
def test_finished_blocks_are_not_coded_again(
    base: Path, finetuned: Path, whole: Manifest, tmp_path: Path, coded: list[object], at: str, left: list[object]
) -> None:
    break_off(base, finetuned, tmp_path / "broken", at)
    coded.clear()
    resumed = compress(base, finetuned, tmp_path / "broken")
    assert coded == left
    assert resumed == whole
    manifest, store = open_artifact(tmp_path / "broken")
    verify_artifact(manifest, store)
    assert not (tmp_path / "broken" / "journal.json").exists()


def test_what_was_allocated_stays(base: Path, finetuned: Path, tmp_path: Path, coded: list[object]) -> None:
    options = {"samples": 8, "sequence_length": 24, "target_ratio": 9}
    whole = compress(base, finetuned, tmp_path / "whole", options=options)
    break_off(base, finetuned, tmp_path / "broken", "block 2 of 3", options)
    coded.clear()
    assert compress(base, finetuned, tmp_path / "broken", options=options) == whole
    assert coded == [1, 2]


def test_blocks_without_changes_are_found_too(base: Path, tmp_path: Path, coded: list[object]) -> None:
    break_off(base, base, tmp_path / "broken", "head and quality")
    coded.clear()
    assert compress(base, base, tmp_path / "broken").blobs == ()
    assert coded == []


def test_a_damaged_or_missing_blob_is_made_again(
    base: Path, finetuned: Path, whole: Manifest, tmp_path: Path, coded: list[object]
) -> None:
    first, second = (blob_key(blob.object_digest) for blob in whole.blobs[:2])
    break_off(base, finetuned, tmp_path / "broken", "head and quality")
    path = tmp_path / "broken" / first
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    (tmp_path / "broken" / second).unlink()
    coded.clear()
    assert compress(base, finetuned, tmp_path / "broken") == whole
    assert coded[:2] == [0, 1]
    verify_artifact(*open_artifact(tmp_path / "broken"))


@pytest.mark.parametrize("what", ["seed", "finetuned", "base", "calibration", "journal"])
def test_a_journal_of_other_inputs_is_not_used(
    base: Path, finetuned: Path, tmp_path: Path, coded: list[object], what: str
) -> None:
    out = tmp_path / "broken"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 9)
    options: dict[str, object] = SMALL | {"calibration": text}
    break_off(base, finetuned, out, "head and quality", options)
    if what == "seed":
        options |= {"seed": 5}
    if what == "finetuned":
        finetuned = make_finetune(base, tmp_path / "other", seed=8)
    if what == "base":
        base = make_finetune(base, tmp_path / "other", seed=8)
    if what == "calibration":
        text.write_text(text.read_text() + "more of it")
    if what == "journal":
        (out / "journal.json").write_text(json.dumps({"key": 3}))
    coded.clear()
    compress(base, finetuned, out, options=options)
    assert coded == [0, 1, 2]


def test_looser_bounds_do_not_start_over(base: Path, finetuned: Path, tmp_path: Path, coded: list[object]) -> None:
    with pytest.raises(QualityTooLow):
        compress(base, finetuned, tmp_path / "artifact", options=SMALL | {"require": "kl<1e-9"})
    coded.clear()
    compress(base, finetuned, tmp_path / "artifact", options=SMALL | {"require": "kl<1000"})
    assert coded == []
