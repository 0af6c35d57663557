"""The commands as a user runs them: processes, files, exit codes, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deltazip_loadgen import Report, TraceFile, TraceRequest
from deltazip_loadgen.cli import app
from deltazip_loadgen.session import read_records
from tests.support.sse_server import FaultyServer


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(argument) for argument in arguments])


def write(path: Path, requests: list[TraceRequest]) -> Path:
    lines = ['{"format": "deltazip-trace/1"}', *(request.model_dump_json(exclude_none=True) for request in requests)]
    path.write_text("\n".join(lines) + "\n")
    return path


def completion(model: str, at_s: float) -> TraceRequest:
    return TraceRequest(at_s=at_s, model=model, endpoint="completion", prompt="x", max_tokens=3)


def test_from_a_new_trace_to_a_report(tmp_path: Path, server: FaultyServer) -> None:
    trace, out, picture, records = (tmp_path / name for name in ("t.jsonl", "r.json", "p.png", "records.jsonl"))
    made = run("trace", trace, "-m", "fine,cold", "-m", "error-429", "-r", 40, "-d", 1, "--max-tokens", 4, "--seed", 5)
    assert made.exit_code == 0, made.output
    requests = list(TraceFile(trace))
    assert f"{len(requests)} requests to 3 models, seed 5" in made.output

    arguments = ("--json", out, "--plot", picture, "--records", records, "--slo-ttft", 30)
    replayed = run("replay", trace, "--url", server.url, *arguments)
    assert replayed.exit_code == 0, replayed.output
    assert "http_error 429" in replayed.output
    report = Report.model_validate_json(out.read_text(), strict=True)
    assert report.total.all.requests == len(requests)
    assert report.run is not None
    assert (report.run.url, report.run.trace, report.run.seed) == (server.url, "t.jsonl", 5)
    assert report.run.generator["rate"] == 40.0
    assert not report.run.interrupted
    assert report.variants["fine"].all.ok == report.variants["fine"].all.good > 0
    assert report.variants["cold"].cold is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(record.index for record in read_records(records)) == list(range(len(requests)))

    again = tmp_path / "again.json"
    assert run("report", records, "--json", again, "--slo-ttft", 30).exit_code == 0
    assert Report.model_validate_json(again.read_text()).total == report.total


def test_a_bad_line_is_found_before_anything_is_sent(tmp_path: Path, server: FaultyServer) -> None:
    trace = write(tmp_path / "t", [completion("fine", 0), completion("fine", 9)])
    trace.write_text(trace.read_text() + "{}\n")
    result = run("replay", trace, "--url", server.url, "--duration", 1)
    assert result.exit_code == 2
    assert "t:4: " in result.output
    assert server.seen == []


def test_the_key_is_sent_and_written_nowhere(tmp_path: Path, server: FaultyServer) -> None:
    trace = write(tmp_path / "t", [completion("fine", 0)])
    outputs = ("--json", tmp_path / "r.json", "--records", tmp_path / "records")
    result = run("replay", trace, "--url", server.url, "--api-key", "sekret", *outputs)
    assert result.exit_code == 0
    assert server.seen[0].headers["authorization"] == "Bearer sekret"
    written = result.output + (tmp_path / "r.json").read_text() + (tmp_path / "records").read_text()
    assert "sekret" not in written


def test_more_requests_at_once_than_the_usual_limit_of_open_files(tmp_path: Path) -> None:
    """The server answers none of them before it has them all."""
    trace = write(tmp_path / "t", [completion("crowd", 0) for _ in range(100)])
    with FaultyServer(crowd=100) as server:
        command = f"ulimit -S -n 64; exec {sys.executable} -m deltazip_loadgen replay {trace} --url {server.url} -q"
        subprocess.run(["bash", "-c", command], check=True, timeout=60)


def test_all_failed_ends_with_one_and_says_why(tmp_path: Path) -> None:
    with FaultyServer() as gone:
        pass
    result = run("replay", write(tmp_path / "t", [completion("fine", 0)]), "--url", gone.url)
    assert result.exit_code == 1
    assert "is the server up" in result.output


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_reports_what_is_done(tmp_path: Path, server: FaultyServer, signal_number: int) -> None:
    requests = [completion("fine", 0), completion("hang", 0.1), completion("fine", 120)]
    trace, out, records = write(tmp_path / "t", requests), tmp_path / "r.json", tmp_path / "records"
    command = [sys.executable, "-m", "deltazip_loadgen", "replay", str(trace), "--url", server.url]
    process = subprocess.Popen(
        [*command, "--json", str(out), "--records", str(records)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"COLUMNS": "200"},
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(server.seen) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "1 cut off when the replay was stopped" in output
    report = json.loads(out.read_text())
    assert report["run"]["interrupted"] is True
    assert (report["total"]["all"]["ok"], report["total"]["all"]["aborted"]) == (1, 1)
    assert [record.outcome for record in read_records(records)] == ["ok", "aborted"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("trace", "{tmp}/o", "-m", "a,a"), "a model is named twice"),
        (("trace", "{tmp}/o", "-m", "a", "-n", "5", "-d", "5"), "not both"),
        (("trace", "{tmp}/o", "-m", "a", "-r", "0"), "rate: Input should be greater than 0"),
        (("trace", "{tmp}/o", "-m", "a", "--max-tokens", "many"), "cannot read lengths 'many'"),
        (("trace", "{tmp}/o", "-m", "a", "--popularity", "weights"), "needs --weights"),
        (("trace", "{tmp}/o", "-m", "a,b", "--popularity", "weights", "--weights", "1,x"), "cannot read --weights"),
        (("trace", "{tmp}/o", "-m", "a,b", "--popularity", "weights", "--weights", "1,-1"), "cannot read --weights"),
        (("trace", "{tmp}/o", "-m", "a,b", "--popularity", "weights", "--weights", "1"), "1 weights for 2 models"),
        (("trace", "{tmp}/no/o", "-m", "a"), "No such file or directory"),
        (("trace", "{tmp}/o", "-m", "a", "--prompts", "{tmp}/absent"), "cannot read"),
        (("replay", "{tmp}/absent"), "No such file"),
        (("replay", "{tmp}/bad"), "bad:2: max_tokens: Field required"),
        (("replay", "{tmp}/good", "--url", "localhost:8000"), "no http(s) URL"),
        (("replay", "{tmp}/good", "--speed", "0"), "speed: Input should be greater than 0"),
        (("replay", "{tmp}/good", "--json", "{tmp}/no/r.json"), "does not exist; create it first"),
        (("replay", "{tmp}/good", "--extra-body", "[1]"), "--extra-body must be a JSON object"),
        (("report", "{tmp}/good"), "good:1: "),
    ],
)
def test_mistakes_end_in_one_line_that_helps(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    write(tmp_path / "good", [completion("fine", 0)])
    (tmp_path / "bad").write_text(
        '{"format": "deltazip-trace/1"}\n{"at_s": 0, "model": "m", "endpoint": "completion", "prompt": ""}\n'
    )
    result = run(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert reason in result.output
    assert not (tmp_path / "o").exists()


def test_a_missing_matplotlib_is_told_before_anything_is_sent(
    tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trace = write(tmp_path / "t", [completion("fine", 0)])
    result = run("replay", trace, "--url", server.url, "--plot", tmp_path / "p.png")
    assert result.exit_code == 2
    assert "pip install 'deltazip-ray[plot]'" in result.output
    assert server.seen == []


@pytest.mark.parametrize("command", ["trace", "replay", "report"])
def test_help_explains_every_option(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert all(option.help for option in app_options(command))


def app_options(command: str) -> list[object]:
    import typer

    return [
        parameter
        for parameter in typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
        if parameter.name != "help"
    ]
