"""One run of the serving benchmark: where it happens, what it has found, and its processes."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from deltazip_deployments.cli import main; main()"]
MARK = "SERVING_BENCHMARK"


@dataclass
class Run:
    """One run, and what it has found so far."""

    folder: Path
    out: Path
    """Where the report goes, as far as it has come."""
    device: str
    shape: str
    variants: tuple[str, ...]
    port: int
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def models(self) -> tuple[str, ...]:
        return ("base", *self.variants)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of a stage, in seconds, and write down what was found until its end."""
        began = time.perf_counter()
        yield
        self.report.setdefault("stages_s", {})[name] = round(time.perf_counter() - began, 2)
        self.save()
        print(f"{name}: {self.report['stages_s'][name]} s", flush=True)

    def save(self) -> None:
        """Write the report."""
        self.out.write_text(json.dumps(self.report, indent=1) + "\n")

    def command(self, *args: object) -> str:
        """Run ``deltazip``; returns what it prints."""
        done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"deltazip {args[0]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return done.stdout


def processes(folder: Path, name: bytes = b"") -> list[int]:
    """Those that the server of ``folder`` started, with ``name`` in their command line."""
    found, mark = [], f"{MARK}={folder}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            ours = entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0")
            if ours and name in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found
