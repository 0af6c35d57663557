"""What the machine can do with as few bytes: a launch that reads them and does nothing else."""

from functools import partial

import torch
from torch import Tensor

from deltazip_kernels.bench.data import DEVICE
from deltazip_kernels.bench.timing import graph_times
from deltazip_kernels.device.read import read

_WORDS = 4096  # 16 KiB a program: 128 bytes under way for each of its threads


def reading_times(size: int, pool: int) -> list[float]:
    """Seconds a launch that reads ``size`` bytes (to whole programs) from memory, walking through ``pool`` bytes."""
    programs = max(1, round(size / (4 * _WORDS)))
    copies = min(64, max(1, pool // (4 * _WORDS * programs)))
    source = torch.randint(-(1 << 31), 1 << 31, (copies, programs * _WORDS), dtype=torch.int32, device=DEVICE)
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    return graph_times([partial(_launch, piece, out, programs) for piece in source])


def _launch(piece: Tensor, out: Tensor, programs: int) -> None:
    read[(programs,)](piece, out, WORDS=_WORDS, num_warps=4)
