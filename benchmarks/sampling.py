"""``python -m benchmarks.sampling --json FILE``: device time of drawing a step's tokens on one GPU.

The limit is reading the logits once.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from deltazip_kernels.bench.__main__ import commit
from deltazip_kernels.bench.timing import copy_bandwidth
from deltazip_kernels.pick import pick, pick_reference
from deltazip_ray.engine.sampling import Draw, SamplingBatch, sample
from deltazip_ray.scheduler.request import SamplingParams

VOCAB = 128_256
KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "min_p": SamplingParams(temperature=0.8, min_p=0.05),
    "top_p": SamplingParams(temperature=0.8, top_p=0.9),
    "top_k": SamplingParams(temperature=0.8, top_k=40),
    "top_k, top_p": SamplingParams(temperature=0.8, top_k=40, top_p=0.9),
}


def milliseconds(run: Callable[[], object]) -> float:
    """The median, with a cold L2."""
    return float(triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median"))


def measure(rows: int) -> dict[str, Any]:
    """Every kind of draw, the last of them checked against sorting."""
    device = torch.device("cuda")
    logits = (torch.randn(rows, VOCAB, device=device) * 3).bfloat16()
    found: dict[str, Any] = {"rows": rows}
    for name, params in KINDS.items():
        batch = SamplingBatch.of([Draw.at(params, row) for row in range(rows)], device)
        found[name] = milliseconds(lambda batch=batch: sample(logits, batch))  # type: ignore[misc]
    if batch.random is None or not torch.equal(
        pick(logits, batch.random.numbers, batch.random.points),
        pick_reference(logits, batch.random.numbers, batch.random.points),
    ):
        raise SystemExit("the tokens are not those of sorting")
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", help="of this tree, where it is no checkout")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here: run it where there is one")
    bandwidth = copy_bandwidth()
    with torch.inference_mode():
        times = [measure(rows) for rows in (1, 32, 256)]
    limits = {rows: 1e3 * rows * VOCAB * 2 / bandwidth for rows in (1, 32, 256)}
    report = {
        "commit": options.commit or commit(),
        "machine": {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__},
        "vocab": VOCAB,
        "bandwidth": bandwidth,
        "limit_ms": limits,
        "ms": times,
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
