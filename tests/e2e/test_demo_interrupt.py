"""Ctrl-C in the demo, from training to the server that stays up: gone in seconds, code 130, nothing left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.demo import QUICK

MARK = "DELTAZIP_TEST_MARK"


class Demo:
    """``deltazip demo`` as a process group of its own, as a terminal starts it."""

    def __init__(self, folder: Path, cache: Path, **settings: Any) -> None:
        config = folder / "config.json"
        config.write_text(json.dumps(QUICK | settings))
        self.cache, self.json, self.scratch = cache, folder / "report.json", folder / "scratch"
        self.scratch.mkdir()
        self.mark = uuid.uuid4().hex
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("deltazip"), "demo"),
                *("--config", config, "--cache", self.cache, "--json", self.json, "--keep"),
            ],
            env=os.environ | {MARK: self.mark, "TMPDIR": str(self.scratch)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    def wait_for(self, line: str) -> None:
        """Read the output up to a line that begins so."""
        assert self.process.stdout is not None
        for read in self.process.stdout:
            self.log.append(read)
            if read.startswith(line):
                return
        pytest.fail(f"the demo ended before {line!r}:\n{''.join(self.log)}")

    def interrupt(self) -> tuple[int, float]:
        """Ctrl-C; the exit code, and how many seconds it took to end."""
        began = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        rest, _ = self.process.communicate(timeout=90)
        self.log.append(rest)
        return self.process.returncode, time.monotonic() - began

    def left(self) -> list[str]:
        """Command lines of the processes that descend from it, whatever their group or parent."""
        mark = f"{MARK}={self.mark}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def kill(self) -> None:
        """For tests that fail."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained models, so that not every test has to train its own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(cache: Path) -> Iterator[Callable[..., Demo]]:
    """Starts the demo with settings that differ from QUICK, in a folder with a short name: Ray puts sockets into it."""
    with tempfile.TemporaryDirectory(prefix="dz") as name, ExitStack() as stack:

        def started(**settings: Any) -> Demo:
            demo = Demo(Path(name), cache, **settings)
            stack.callback(demo.kill)
            return demo

        yield started


def check_ended(demo: Demo, within_s: float) -> None:
    code, seconds = demo.interrupt()
    log = "".join(demo.log)
    assert code == 130, log
    assert "Traceback" not in log
    assert seconds < within_s
    deadline = time.monotonic() + 5
    while (left := demo.left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert list(demo.scratch.glob("deltazip-demo-*")) == []
    for checkpoint in demo.cache.glob("*/*"):
        files = {path.name for path in checkpoint.iterdir()}
        if checkpoint.name.startswith("."):
            # Ctrl-C came between the making of a folder and the promise to remove it.
            assert not files
        else:
            assert files >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("phase", ["fine-tune reverse", "compress sort"])
def test_before_the_server_is_up(start: Callable[..., Demo], phase: str) -> None:
    """While it starts: tests/e2e/test_serve_exit.py."""
    demo = start()
    demo.wait_for(f"{phase}: started")
    check_ended(demo, within_s=10)


def test_during_the_replay(start: Callable[..., Demo]) -> None:
    demo = start(requests=10_000, rate=5)
    demo.wait_for("replay the trace: started")
    time.sleep(1.0)
    check_ended(demo, within_s=40)


def test_keep_shows_commands_that_work_and_ends_on_interrupt(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_for("EOF")
    shown = "".join(demo.log)
    curl = re.search(r"^curl .*$", shown, re.MULTILINE)
    snippet = re.search(r"^python - <<'EOF'\n.*?^EOF$", shown, re.MULTILINE | re.DOTALL)
    assert curl is not None
    assert snippet is not None
    answer = json.loads(_shell(curl.group()))
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "sort"
    assert _shell(snippet.group()).endswith("\n")
    assert len(json.loads(demo.json.read_text())["variants"]) == 5
    check_ended(demo, within_s=40)


def _shell(command: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
