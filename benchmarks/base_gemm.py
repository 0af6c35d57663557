"""``python -m benchmarks.base_gemm --json FILE``: the base's products for the linears of an 8B model, ours and torch's.

Microseconds of a CUDA graph of a linear's products behind each other, over weights that no cache holds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deltazip_kernels.bench.__main__ import commit
from deltazip_kernels.bench.timing import copy_bandwidth, graph_times
from deltazip_kernels.fp8 import FP8, Fp8Matrix
from deltazip_kernels.skinny import MOST_ROWS, BaseProduct, Cut, cut

SHAPES = {
    "q|k|v": (6144, 4096),
    "o": (4096, 4096),
    "gate|up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ROWS = (8, 32, 64, 128, 256, 1024, 8192)
_BYTES = 800 << 20  # of weights, in turn


class OwnProduct(BaseProduct):
    """Ours wherever the kernel can, for comparison where torch's is taken."""

    def cut(self, x: Tensor | Fp8Matrix, weight: Tensor | Fp8Matrix) -> Cut | None:
        """See the base class."""
        itemsize = 1 if isinstance(x, Fp8Matrix) else x.dtype.itemsize
        return cut(x.shape[0], (weight.shape[0], weight.shape[1]), itemsize)


def random_fp8(rows: int, columns: int) -> Fp8Matrix:
    """Normal values."""
    values = (64 * torch.randn(rows, columns, device="cuda")).to(FP8)
    return Fp8Matrix(values, torch.full((rows,), 1e-3, device="cuda"))


def microseconds(run: Callable[[int], object], count: int) -> float:
    """Of one of ``count`` runs, each over a weight of its own."""
    return 1e6 * median(graph_times([partial(run, i) for i in range(count)]))


def in_bfloat16(name: str, rows: int, product: OwnProduct) -> dict[str, float]:
    """Torch's, and ours where the kernel takes so many rows."""
    outputs, columns = SHAPES[name]
    count = max(2, _BYTES // (2 * outputs * columns))
    y = torch.empty(rows, outputs, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(rows, columns, device="cuda").bfloat16()
    weights = [torch.randn(outputs, columns, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    found = {"bfloat16, torch": microseconds(lambda i: torch.mm(x, weights[i].T, out=y), count)}
    if rows <= MOST_ROWS:
        found["bfloat16, ours"] = microseconds(lambda i: product(y, x, weights[i]), count)
    return found


def in_fp8(name: str, rows: int, product: OwnProduct) -> dict[str, float]:
    """The same in fp8."""
    outputs, columns = SHAPES[name]
    count = max(2, _BYTES // (outputs * columns))
    y = torch.empty(rows, outputs, dtype=torch.bfloat16, device="cuda")
    x, weights = random_fp8(rows, columns), [random_fp8(outputs, columns) for _ in range(count)]

    def library(i: int) -> None:
        scales = x.scales[:, None], weights[i].scales[None]
        torch._scaled_mm(x.values, weights[i].values.T, *scales, out_dtype=y.dtype, out=y)

    found = {"fp8, torch": microseconds(library, count)}
    if rows <= MOST_ROWS:
        found["fp8, ours"] = microseconds(lambda i: product(y, x, weights[i]), count)
    return found


def main() -> None:
    """Measure all shapes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="of this tree, where it is no checkout")
    options = parser.parse_args()
    product = OwnProduct(torch.device("cuda"))
    results: dict[str, Any] = {
        "commit": options.commit or commit(),
        "gpu": torch.cuda.get_device_name(),
        "bandwidth": copy_bandwidth(),
        "microseconds": {},
    }
    for name in SHAPES:
        for rows in ROWS:
            found = in_bfloat16(name, rows, product) | in_fp8(name, rows, product)
            results["microseconds"].setdefault(name, {})[rows] = found
            sys.stdout.write(f"{name} {rows}: {found}\n")
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
