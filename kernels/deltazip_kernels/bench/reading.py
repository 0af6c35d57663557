"""What the machine can do with as few bytes: a launch that reads them and does nothing else."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from deltazip_kernels.bench.data import DEVICE, SHAPES
from deltazip_kernels.bench.result import Result
from deltazip_kernels.bench.timing import graph_times
from deltazip_kernels.device.read import read
from deltazip_kernels.layout import packed_bytes

_WORDS = 4096  # 16 KiB a program: 128 bytes under way for each of its threads


def readings(codec: str, counts: Sequence[int], pool: int) -> Iterator[Result]:
    """The bytes of ``counts`` deltas of each linear of an 8B model, from memory (rounded down to whole programs)."""
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for (name, shapes), count in product(SHAPES.items(), counts):
        programs = count * sum(packed_bytes(codec, shape) for shape in shapes) // (4 * _WORDS)
        words = programs * _WORDS
        copies = min(64, max(1, pool // (4 * words)))
        source = torch.randint(-(1 << 31), 1 << 31, (copies, words), dtype=torch.int32, device=DEVICE)
        times = graph_times([partial(_launch, piece, out, programs) for piece in source])
        yield Result("reading", codec, name, f"{count}", 0, 4 * words, times)
        del source


def _launch(piece: Tensor, out: Tensor, programs: int) -> None:
    read[(programs,)](piece, out, WORDS=_WORDS, num_warps=4)
