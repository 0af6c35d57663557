"""The image, as far as it can be checked without building it."""

import asyncio
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from deltazip_deployments.app import SERVE_ENVIRONMENT
from tests.support.s3 import free_ports

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
MANIFEST = (ROOT / "k8s" / "rayservice.yaml").read_text()
HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option abortonclose
    option splice-request
    option splice-response
frontend front
    bind 127.0.0.1:{front}
    default_backend back
backend back
    server one 127.0.0.1:{back}
"""


def environment() -> dict[str, str]:
    (service,) = [one for one in yaml.safe_load_all(MANIFEST) if one["kind"] == "RayService"]
    (container,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    return {one["name"]: one["value"] for one in container["env"]}


def test_what_is_copied_exists_and_is_let_in() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    lines = re.findall(r"^COPY (.+)", DOCKERFILE, re.MULTILINE)
    copied = [source for line in lines for source in shlex.split(line)[:-1]]
    sources = [source for source in copied if not source.startswith("--")]
    assert len(sources) > 8
    assert [source for source in sources if not (ROOT / source).exists() or f"!{source}" not in ignore] == []


def test_what_is_installed_is_what_the_project_names() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"\['optional-dependencies'\]\['(\w+)'\]", DOCKERFILE)
    assert wanted in extras


def test_the_manifest_wants_the_image_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert set(re.findall(r"image: (\S+)", MANIFEST)) == {f"deltazip-ray:{version}"}
    assert f"/deltazip-ray:{version}" in DOCKERFILE


def test_serve_is_started_as_the_command_starts_it() -> None:
    assert environment().items() >= SERVE_ENVIRONMENT.items()
    assert f"k8s/haproxy {environment()['RAY_SERVE_HAPROXY_BINARY_PATH']}\n" in DOCKERFILE


async def test_haproxy_tells_when_a_client_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    left, begun = asyncio.Event(), asyncio.Event()

    async def work(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        begun.set()
        try:
            await reader.read()
        except ConnectionResetError:
            left.set()

    front, back = free_ports(2)
    (tmp_path / "haproxy.cfg").write_text(HAPROXY.format(front=front, back=back))
    async with await asyncio.start_server(work, "127.0.0.1", back):
        haproxy = await asyncio.create_subprocess_exec(ROOT / "k8s" / "haproxy", "-f", tmp_path / "haproxy.cfg")
        try:
            _, writer = await connected(front)
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
            await asyncio.sleep(0.05)  # clients send the body on its own, and only then there is something to splice
            writer.write(b"{}")
            await asyncio.wait_for(begun.wait(), 10)
            writer.close()
            await asyncio.wait_for(left.wait(), 5)
        finally:
            haproxy.terminate()
            await haproxy.wait()


async def connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection, as soon as somebody listens."""
    for _ in range(200):
        try:
            return await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.05)
    raise TimeoutError(f"nobody listens at {port}")
