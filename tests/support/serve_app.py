"""The application on a real Ray, for one test module: scripted engines, real node stores, a private home."""

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import ray

from deltazip_deployments.serving import running
from deltazip_ray.config import AppConfig
from tests.support.fake_engine import Script
from tests.support.s3 import free_ports

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class ServeApp:
    """A running application."""

    url: str

    def samples(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """A metric's samples by their labels, from one scrape of the router."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        found = {}
        for sample, labels, value in _SAMPLE.findall(text):
            if sample == name:
                found[tuple(sorted(re.findall(r'(\w+)="(.*?)"', labels)))] = float(value)
        return found

    def by_replica(self, name: str) -> dict[str, float]:
        """A metric's samples by replica."""
        return {dict(labels)["replica"]: value for labels, value in self.samples(name).items()}

    def kill_replica(self, replica: str) -> None:
        """End a replica at once, in the middle of whatever it does."""
        ray.kill(ray.get_actor(f"SERVE_REPLICA::deltazip#replica#{replica}", namespace="serve"))


@contextmanager
def private_ray() -> Iterator[None]:
    """A home and a temporary folder for Ray alone: tokens, sessions and logs end with the test."""
    # Short, for it becomes part of the paths of sockets.
    folder = tempfile.mkdtemp(prefix="dz-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", folder)
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def serve_app(config: AppConfig, script: Script) -> Iterator[ServeApp]:
    """Serve; uses the Ray that this process is connected to, or starts one."""
    with running(config, port=free_ports(1)[0], engine_factory=script) as url:
        yield ServeApp(url)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for something that other processes bring about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"did not come about within {timeout_s:g} s")
        time.sleep(0.05)


def scratch(folder: Path, name: str) -> Path:
    """A new folder."""
    (folder / name).mkdir()
    return folder / name
