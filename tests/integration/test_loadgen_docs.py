"""docs/loadgen.md names what there is, and its examples work as printed."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from deltazip_loadgen import Record, Report, TraceHeader, TraceRequest
from deltazip_loadgen.cli import app
from deltazip_loadgen.options import ReplayOptions
from deltazip_loadgen.prompts import PromptPool
from deltazip_loadgen.record import Outcome
from deltazip_loadgen.report import Breakdown, Fairness, Group, RunInfo, Slo
from deltazip_loadgen.stats import Distribution
from deltazip_loadgen.trace import TraceFile
from tests.support.sse_server import FaultyServer

TEXT = (Path(__file__).parents[2] / "docs" / "loadgen.md").read_text()
MODELS = [
    *(TraceHeader, TraceRequest, Record, ReplayOptions),
    *(Report, RunInfo, Slo, Breakdown, Group, Fairness, Distribution),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_documented(model: type[BaseModel]) -> None:
    assert [name for name in model.model_fields if f"`{name}`" not in TEXT] == []


def test_every_outcome_and_option_is_documented() -> None:
    assert [name for name in get_args(Outcome) if f"| `{name}` |" not in TEXT] == []
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    options = {
        option
        for command in group.commands.values()
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and option != "--help"
    }
    assert len(options) > 20
    assert sorted(option for option in options if option not in TEXT) == []


def test_the_example_trace_and_pool_are_valid(tmp_path: Path) -> None:
    trace, pool = blocks("json")
    (tmp_path / "trace.jsonl").write_text(trace)
    (tmp_path / "pool.jsonl").write_text(pool)
    assert [request.model for request in TraceFile(tmp_path / "trace.jsonl")] == ["math", "base"]
    assert len(PromptPool.load(tmp_path / "pool.jsonl").of("sql")) == 1


def test_the_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with FaultyServer() as server:
        for line in blocks("bash")[0].strip().splitlines():
            words = shlex.split(
                line.replace("http://127.0.0.1:8000", server.url).replace("--duration 60", "--duration 3")
            )
            assert words[:3] == ["python", "-m", "deltazip_loadgen"]
            result = CliRunner().invoke(app, words[3:])
            assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"trace.jsonl", "report.json", "records.jsonl", "report.png"}


def test_the_python_example_works() -> None:
    with FaultyServer() as server:
        source = blocks("python")[0].replace("http://127.0.0.1:8000", server.url).replace("rate=4.0", "rate=200.0")
        scope: dict[str, object] = {}
        exec(source, scope)
    assert isinstance(scope["report"], Report)
    assert scope["report"].total.all.ok == 100
