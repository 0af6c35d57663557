"""``deltazip serve`` from the outside: it serves, and however it ends, nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.s3 import free_ports
from tests.support.serve_app import private_ray, scratch, wait_until
from tests.support.tiny import make_base

SERVE = "import typer; from deltazip_deployments.serve_command import serve; typer.run(serve)"


@pytest.fixture
def home() -> Iterator[str]:
    with private_ray():
        yield os.environ["HOME"]


def start(folder: Path, port: int) -> subprocess.Popen[str]:
    """Start the command in a process group of its own, as a shell or a service manager does."""
    settings = {
        "base": str(make_base(folder / "base")),
        "base_name": "tiny",
        "store": {"url": scratch(folder, "store").as_uri()},
        "engine": {"threads": 1, "max_model_len": 64, "kv_blocks": 16, "slots": 1},
        "node_store": {"arena_bytes": 1 << 20},
    }
    application = {"name": "deltazip", "import_path": "deltazip_deployments.app:build", "args": settings}
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump({"http_options": {"port": port}, "applications": [application]}))
    command = [sys.executable, "-c", SERVE, "--config", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def relatives(home: str) -> dict[int, str]:
    """Command lines of all processes that were started with this home."""
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process.name != str(os.getpid()):
            try:
                if f"HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


def nothing_is_left(home: str, timeout_s: float = 15.0) -> None:
    """Processes notice the end of their parents, and need a moment for their own."""
    deadline = time.monotonic() + timeout_s
    while left := relatives(home):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@contextmanager
def ended(server: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever a test finds, the server does not outlive it."""
    try:
        yield
    finally:
        server.kill()


def gcs_is_up(home: str) -> bool:
    return any("gcs_server" in command for command in relatives(home).values())


def test_it_serves_and_sigterm_to_the_group_ends_all(home: str, tmp_path: Path) -> None:
    port = free_ports(1)[0]
    with start(tmp_path, port) as server, ended(server):
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}/v1" in server.stdout.readline()
        assert len(relatives(home)) > 5
        asked = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=30)
        assert answer.json()["usage"]["prompt_tokens"] == 3
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
        nothing_is_left(home)


def test_ctrl_c_while_it_starts_ends_all(home: str, tmp_path: Path) -> None:
    with start(tmp_path, free_ports(1)[0]) as server, ended(server):
        wait_until(lambda: gcs_is_up(home), timeout_s=60)
        time.sleep(3)  # Ray starts its agents about now: the moment in which they do not yet watch their parents
        os.killpg(server.pid, signal.SIGINT)
        server.wait(timeout=60)
        assert server.returncode != 0
        nothing_is_left(home)


def test_it_does_not_outlive_ray(home: str, tmp_path: Path) -> None:
    with start(tmp_path, free_ports(1)[0]) as server, ended(server):
        assert server.stdout is not None
        server.stdout.readline()
        (raylet,) = (process for process, command in relatives(home).items() if "/raylet/raylet " in command)
        os.kill(raylet, signal.SIGKILL)
        assert server.wait(timeout=30) == 1
        nothing_is_left(home)
