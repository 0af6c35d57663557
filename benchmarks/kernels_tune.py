"""Which tile is fastest for each size of work item: ``python -m benchmarks.kernels_tune OUT.json`` on a GPU.

The winners stand in ``deltazip_kernels.triton_backend``.
"""

import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch

from deltazip_kernels.bench.cases import POOL
from deltazip_kernels.bench.data import SHAPES, make_tables, random_batch, work_of
from deltazip_kernels.bench.timing import graph_times
from deltazip_kernels.quantize import quantize_rows
from deltazip_kernels.triton_backend import Tile, grouped_matmul

CODECS = ["int4", "int2", "sparse24_int4", "int1"]
BATCHES = {
    16: [(8, 4), (32, 1), (1, 16), (2, 16), (8, 16), (32, 16)],
    32: [(1, 32), (2, 32), (8, 32)],
    64: [(1, 64), (8, 64), (1, 512)],
}
"""By rows that an item may have: segments and rows of each."""
SPLITS = (1, 2, 4)
TILES = [
    Tile(*sizes)
    for sizes in product((64, 128, 256), (1, 2, 4, 8), (3, 4, 5), SPLITS)
    if 16 <= sizes[0] // sizes[1] <= 64
]


def times(codec: str, linear: str, segments: int, rows: int) -> dict[Tile, float]:
    """Seconds a launch of every tile that the GPU can hold."""
    shapes = SHAPES[linear]
    tables, _ = make_tables(shapes, [codec] * segments, POOL)
    x, y = random_batch(segments * rows, shapes[0][1], sum(n for n, _ in shapes))
    work = work_of([rows] * segments)
    rounded = quantize_rows(x)
    found = {}
    for tile in TILES:
        try:
            launches = [partial(grouped_matmul, y, rounded, table, work, [codec], tile) for table in tables]
            found[tile] = median(graph_times(launches, 5))
        except Exception as error:  # noqa: BLE001 - Triton has no common error for tiles that do not fit
            print(f"{tile}: {error}", file=sys.stderr)
    torch.cuda.empty_cache()
    return found


def main() -> None:
    records = []
    for item, batches in BATCHES.items():
        for codec, linear, (segments, rows) in product(CODECS, SHAPES, batches):
            found = times(codec, linear, segments, rows)
            best = min(found, key=lambda tile: found[tile])
            print(f"{item:3} {codec:14} {linear:8} {segments}x{rows}: {best} {found[best] * 1e6:.1f} us", flush=True)
            case = {"item": item, "codec": codec, "linear": linear, "segments": segments, "rows": rows}
            records += [case | vars(tile) | {"seconds": seconds} for tile, seconds in found.items()]
    Path(sys.argv[1]).write_text(json.dumps(records))


if __name__ == "__main__":
    main()
