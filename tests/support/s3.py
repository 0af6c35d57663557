"""A real S3 server for tests: OpenStack Swift with its S3 API, four processes on loopback.

It can be stopped, killed and started again on the same port with the same contents, and its processes die with the
process that started them. Needs a file system with user xattrs (ext4, xfs, overlay, tmpfs of Linux >= 6.6).
"""

import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

ACCESS_KEY, SECRET_KEY, REGION = "test:tester", "testing", "us-east-1"
LIST_PAGE = 100
"""Keys in one answer to a listing: few, so that tests see more than one."""
READY_WITHIN_S = 60.0
_SERVERS = ("account", "container", "object", "proxy")

# The servers leave our session (setsid), so the kernel is asked to kill them when their parent dies.
_LAUNCH = """
import ctypes, importlib, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
importlib.import_module(f"swift.{sys.argv.pop(1)}.server").main()
"""
_MAKE_RINGS = """
import sys
from swift.common.ring import RingBuilder
for name, port in zip(("account", "container", "object"), sys.argv[2:]):
    builder = RingBuilder(4, 1, 0)
    where = {"ip": "127.0.0.1", "replication_ip": "127.0.0.1", "port": int(port), "replication_port": int(port)}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "d1", **where})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{name}.ring.gz")
"""
_PIPELINE = (
    *("catch_errors", "proxy-logging", "cache", "listing_formats", "s3api", "tempauth"),
    *("copy", "slo", "dlo", "proxy-logging", "proxy-server"),
)


class S3Server:
    """One server; ``root`` keeps its configuration, its contents and its logs."""

    access_key, secret_key, region = ACCESS_KEY, SECRET_KEY, REGION

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ports = dict(zip(_SERVERS, free_ports(len(_SERVERS)), strict=True))
        self.endpoint = f"http://127.0.0.1:{self.ports['proxy']}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._buckets = itertools.count()
        (root / "srv" / "d1").mkdir(parents=True)
        self._configure()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to find this server through boto3."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @cached_property
    def client(self) -> Any:
        """A plain boto3 client, for looking behind a store's back."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=20),
        )

    def new_bucket(self) -> str:
        """Make an empty bucket and return its name."""
        name = f"bucket-{next(self._buckets)}"
        self.client.create_bucket(Bucket=name)
        return name

    def start(self) -> None:
        """Start the processes and wait until they answer."""
        for server in _SERVERS:
            with (self.root / f"{server}.log").open("ab") as log:
                module = {"object": "obj"}.get(server, server)
                command = [sys.executable, "-W", "ignore", "-c", _LAUNCH, module, str(self.root / f"{server}.conf")]
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self._processes.append(process)
        for server, port in self.ports.items():
            self._wait_for(server, port)

    def stop(self) -> None:
        """End the processes; what was stored stays."""
        for process in self._processes:
            process.terminate()
        self._reap()

    def kill(self) -> None:
        """End the processes at once, in the middle of whatever they do."""
        for process in self._processes:
            process.kill()
        self._reap()

    def _reap(self) -> None:
        for process in self._processes:
            process.wait(timeout=20)
        self._processes.clear()

    def _wait_for(self, server: str, port: int) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                dead = any(process.poll() is not None for process in self._processes)
                if dead or time.monotonic() > deadline:
                    self.kill()
                    logs = "".join((self.root / f"{name}.log").read_text(errors="replace")[-2000:] for name in _SERVERS)
                    raise RuntimeError(f"swift's {server} server did not start on port {port}:\n{logs}") from None
                time.sleep(0.05)
            else:
                return

    def _configure(self) -> None:
        storage_ports = [str(self.ports[server]) for server in _SERVERS[:3]]
        subprocess.run([sys.executable, "-W", "ignore", "-c", _MAKE_RINGS, str(self.root), *storage_ports], check=True)
        self._write("swift", {"swift-hash": {"swift_hash_path_suffix": "deltazip"}})
        for server in _SERVERS[:3]:
            self._write(
                server,
                {
                    "DEFAULT": self._defaults(server),
                    "pipeline:main": {"pipeline": f"{server}-server"},
                    f"app:{server}-server": {"use": f"egg:swift#{server}"},
                },
            )
        filters = {f"filter:{name}": {"use": f"egg:swift#{name.replace('-', '_')}"} for name in _PIPELINE[:-1]}
        filters["filter:cache"] = {"use": "egg:swift#memcache"}
        filters["filter:tempauth"] |= {"user_test_tester": f"{SECRET_KEY} .admin", "account_autocreate": "true"}
        filters["filter:s3api"] |= {"location": REGION, "max_bucket_listing": str(LIST_PAGE)}
        self._write(
            "proxy",
            {
                "DEFAULT": self._defaults("proxy"),
                "pipeline:main": {"pipeline": " ".join(_PIPELINE)},
                "app:proxy-server": {"use": "egg:swift#proxy", "account_autocreate": "true"},
                **filters,
            },
        )

    def _defaults(self, server: str) -> dict[str, str]:
        return {
            "bind_ip": "127.0.0.1",
            "bind_port": str(self.ports[server]),
            "workers": "0",
            "swift_dir": str(self.root),
            "devices": str(self.root / "srv"),
            "mount_check": "false",
            "fallocate_reserve": "0",
            "log_address": "/nonexistent",
            "recon_cache_path": str(self.root),
        }

    def _write(self, name: str, sections: dict[str, dict[str, str]]) -> None:
        lines: list[str] = []
        for section, settings in sections.items():
            lines += [f"[{section}]", *(f"{key} = {value}" for key, value in settings.items()), ""]
        (self.root / f"{name}.conf").write_text("\n".join(lines))


def free_ports(count: int) -> Sequence[int]:
    """TCP ports of loopback that nobody listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running server that the whole session shares: take a bucket of your own with ``new_bucket()``."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The shared server, found by everything that this process starts or connects through boto3."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def own_s3_server(tmp_path: Path) -> Iterator[S3Server]:
    """A running server of one test, which may kill it and start it again."""
    server = S3Server(tmp_path / "s3")
    server.start()
    yield server
    server.stop()
