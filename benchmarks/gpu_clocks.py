"""Clock and power of the GPU beside a run, as ``nvidia-smi`` tells them."""

import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ASK = ["--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active", "--format=csv,noheader,nounits"]
_POWER_CAP = 0x4 | 0x80
"""Reasons for which a clock is lower: a limit of power, in software or hardware."""


@contextmanager
def clocks(found: dict[str, Any], every_ms: int = 300) -> Iterator[None]:
    """Put medians of MHz and watts during the block into ``found``, and the share of samples capped by power.

    Nothing where there is no ``nvidia-smi``.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield
        return
    with subprocess.Popen([tool, *_ASK, f"--loop-ms={every_ms}"], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield
        finally:
            process.terminate()
            lines, _ = process.communicate()
    found["clocks"] = summary(lines)


def summary(lines: str) -> dict[str, Any]:
    """Of what ``nvidia-smi`` wrote."""
    samples = [line.split(", ") for line in lines.splitlines() if line.count(", ") == 2]
    if not samples:
        return {"samples": 0}
    return {
        "samples": len(samples),
        "mhz": statistics.median(float(mhz) for mhz, _, _ in samples),
        "watts": statistics.median(float(watts) for _, watts, _ in samples),
        "capped": sum(bool(int(reasons, 16) & _POWER_CAP) for _, _, reasons in samples) / len(samples),
    }
