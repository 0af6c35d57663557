"""The benchmark of the compressor runs, tells every stage, and leaves the compressor as it was."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import compress_speed
from deltazip_ray.compress.runner import Runner


def test_every_stage_is_told_and_the_times_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, file = Runner.run, tmp_path / "speed.json"
    arguments = ["--shape", "tiny", "--layers", "1", "--target-bits", "2", "--samples", "8", "--sequence-length", "16"]
    monkeypatch.setattr(sys, "argv", ["compress_speed", "--json", str(file), *arguments])
    compress_speed.main()
    told = json.loads(file.read_text())
    assert told["stages"].keys() == {"the rest"} | {name for _, _, name in compress_speed.STAGES}
    assert sum(told["stages"].values()) == pytest.approx(told["seconds"], rel=0.02)
    assert 8 * told["bytes_artifact"] <= 2.1 * told["bytes_finetuned"] / 2
    assert len(told["codecs"]) > 1
    assert Runner.run is run
