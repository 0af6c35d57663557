"""A bad artifact is neither written nor published."""

import contextlib
import io
from pathlib import Path

import pytest

from deltazip_ray.artifact.artifact import open_artifact
from deltazip_ray.cli.app import app
from deltazip_ray.cli.console import run
from deltazip_ray.errors import ManifestInvalid
from tests.support.tiny import make_base, make_finetune


def deltazip(*args: object) -> tuple[int, str]:
    """Exit code and what went to stderr."""
    stderr = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as end,
    ):
        run(lambda: app(list(map(str, args))))
    return int(end.value.code or 0), stderr.getvalue()


def test_require_stops_compress_and_publish(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    finetuned = make_finetune(base, tmp_path / "finetuned")
    small = ("--samples", 8, "--sequence-length", 24, "--codec", "int1")
    command = ("compress", base, finetuned, "--out", tmp_path / "delta", *small)
    code, told = deltazip(*command, "--require", "kl<1e-9,block<0.001%")
    assert code == 1
    assert "the KL divergence from the fine-tune is" in told
    assert "not below 0.001%" in told
    with pytest.raises(ManifestInvalid):
        open_artifact(tmp_path / "delta")

    code, told = deltazip(*command, "--require", "kl<1000,sort:acc>0.5")
    assert code == 1
    assert "sort:acc cannot be measured before the artifact exists" in told

    code, told = deltazip(*command, "--require", "kl<1000")
    assert code == 0
    assert told.startswith("note: no --calibration")
    store = tmp_path / "store"
    code, told = deltazip("publish", tmp_path / "delta", store, "--name", "x", "--require", "block<0.001%")
    assert (code, store.exists()) == (1, False)
    assert "not below 0.001%" in told
    assert deltazip("publish", tmp_path / "delta", store, "--name", "x", "--require", "kl<1000")[0] == 0
    assert deltazip("publish", tmp_path / "delta", store, "--name", "x", "--require", "kl=1")[0] == 1
