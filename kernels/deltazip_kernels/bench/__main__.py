"""``python -m deltazip_kernels.bench --json FILE``: needs a CUDA device; ten seconds once all is compiled."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from deltazip_kernels.bench.cases import long_segments, mixtures, overheads, products
from deltazip_kernels.bench.data import OTHERS
from deltazip_kernels.bench.layer import layers
from deltazip_kernels.bench.result import Result
from deltazip_kernels.bench.timing import copy_bandwidth
from deltazip_kernels.delta import LOW_RANK, RAW
from deltazip_kernels.layout import CODECS, LAYOUT_VERSION

BATCHES = {8: [1, 4, 16], 32: [1, 4, 16]}
BUSY = {1: [8, 32, 64], 2: [16, 32], 8: [32, 64]}
"""Few versions, and versions of many rows."""

STEPS = [[3072, 2816, 2304], [2700, 2600, 2500]]
"""Rows of three versions in a step with room for 8192."""


def cases(quick: bool) -> Iterator[Result]:
    """All measurements, or a few of each kind."""
    yield from products(["int2"] if quick else list(CODECS), {8: [4]} if quick else BATCHES)
    yield from products(["sparse24_int4", "int4", "int2"], {8: [1], 1: [512]}, OTHERS)
    yield from products(["int2"] if quick else ["int4", "int2"], {1: [32]} if quick else BUSY)
    yield from mixtures("int2", ["o"] if quick else ["o", "gate_up"])
    yield from overheads()
    yield from layers("int2", [(8, 4), (32, 1)] if quick else [(8, 4), (32, 1), (1, 32), (2, 16), (8, 32)])
    if quick:
        return
    yield from products([RAW], {8: [1, 16]})
    yield from products([LOW_RANK], {32: [1]})


def long_cases() -> Iterator[Result]:
    """Those of long segments."""
    one = [[rows] for rows in (64, 128, 256, 384, 512, 640, 768, 1024, 2048, 4096)]
    return long_segments(["int4", "int2"], [*one, *STEPS])


def line(result: Result, bandwidth: float) -> str:
    """One row of the table: what, time, and the shares of the memory's speed or the ratio to the base alone."""
    what = f"{result.kind:17} {result.codec:13} {result.linear:8} {result.segments:24} {result.rows:5} rows"
    if result.reference is not None and result.kind != "product":
        return f"{what} {result.seconds * 1e6:8.1f} us  {result.seconds / result.reference:5.2f} x without deltas"
    share = result.record(bandwidth)["share_of_copy_bandwidth"]
    reading = f"  {result.reference / result.seconds:5.2f} of reading alone" if result.reference else ""
    return (
        f"{what} {result.seconds * 1e6:8.1f} us  {result.bytes / 1e6:7.1f} MB  {share:5.2f} of copy bandwidth{reading}"
    )


def commit() -> str:
    """The checkout's commit, or ``unknown`` outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deltazip_kernels.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all results with raw samples here")
    parser.add_argument("--commit", default=None, help="the commit to record, where the checkout is not at hand")
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--long", action="store_true", help="long segments instead of the rest")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    sys.stdout.write(f"copy bandwidth {bandwidth / 1e12:.3f} TB/s\n")
    records = []
    for result in long_cases() if options.long else cases(options.quick):
        records.append(result.record(bandwidth))
        sys.stdout.write(line(result, bandwidth) + "\n")
        sys.stdout.flush()
        torch.cuda.empty_cache()
    if options.json:
        head = {
            "commit": options.commit or commit(),
            "machine": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "layout_version": LAYOUT_VERSION,
            "copy_bandwidth": bandwidth,
        }
        options.json.write_text(json.dumps(head | {"results": records}, indent=1))


if __name__ == "__main__":
    main()
