"""Random deltas and batches on the GPU. Random bytes are valid codes; speed does not depend on their values."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from deltazip_kernels.delta import LOW_RANK, RAW, PackedDelta, Segments
from deltazip_kernels.layout import packed_layout
from deltazip_kernels.plan import Work, in_halves, plan
from deltazip_kernels.table import DeltaTable

DEVICE = torch.device("cuda")
SHAPES = {
    "qkv": ((4096, 4096), (1024, 4096), (1024, 4096)),
    "o": ((4096, 4096),),
    "gate_up": ((14336, 4096), (14336, 4096)),
    "down": ((4096, 14336),),
}
"""The linears of an 8B Llama, those that share their input together."""
OTHERS = {"4096x22016": ((22016, 4096),), "11008x4096": ((4096, 11008),)}
"""Further linears for which others have published times."""
_KEPT_PAIRS = [0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100]


def random_delta(codec: str, shape: tuple[int, int], rank: int = 16) -> PackedDelta:
    """A delta of random contents, on the GPU."""
    if codec == RAW:
        return PackedDelta(RAW, shape, {"values": torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 0.01})
    if codec == LOW_RANK:
        down = torch.randn((rank, shape[1]), device=DEVICE, dtype=torch.bfloat16) * 0.01
        up = torch.randn((shape[0], rank), device=DEVICE, dtype=torch.bfloat16) * 0.01
        return PackedDelta(LOW_RANK, shape, {"down": down, "up": up})
    tensors = {}
    for name, (dims, _) in packed_layout(codec, shape).items():
        if name == "scales":
            tensors[name] = (torch.rand(dims, device=DEVICE) * 0.01 + 0.001).bfloat16()
        elif name == "index":
            pairs = torch.tensor([a | b << 4 for a in _KEPT_PAIRS for b in _KEPT_PAIRS], dtype=torch.uint8)
            tensors[name] = pairs.to(DEVICE)[torch.randint(0, len(pairs), dims, device=DEVICE)]
        else:
            tensors[name] = torch.randint(0, 256, dims, dtype=torch.uint8, device=DEVICE)
    return PackedDelta(codec, shape, tensors)


def delta_bytes(delta: PackedDelta) -> int:
    """Bytes that a product with the delta has to read."""
    return sum(tensor.numel() * tensor.itemsize for tensor in delta.tensors.values())


def make_tables(shapes: Sequence[tuple[int, int]], codecs: Sequence[str], pool: int) -> tuple[list[DeltaTable], int]:
    """Tables whose slot ``i`` holds deltas of ``codecs[i]``, together at least ``pool`` bytes; and the bytes of one."""
    tables: list[DeltaTable] = []
    size = 0
    while not tables or (size * len(tables) < pool and len(tables) < 64):
        table = DeltaTable(shapes, len(codecs), DEVICE)
        size = 0
        for slot, codec in enumerate(codecs):
            deltas = [random_delta(codec, shape) for shape in shapes]
            table.set(slot, deltas)
            size += sum(delta_bytes(delta) for delta in deltas)
        tables.append(table)
    return tables, size


def segments_of(lengths: Sequence[int]) -> Segments:
    """Segment ``i`` of ``lengths[i]`` rows, of slot ``i``."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    return Segments(starts, torch.arange(len(lengths), dtype=torch.int32, device=DEVICE))


def work_of(lengths: Sequence[int]) -> Work:
    """What a step does for :func:`segments_of` as many rows; ValueError where there are none."""
    work = plan(segments_of(lengths), sum(lengths), max(lengths), halves=in_halves(lengths))
    if work is None:
        raise ValueError("no segment has rows")
    return work


def random_batch(rows: int, columns: int, outputs: int) -> tuple[Tensor, Tensor]:
    """x [rows, columns] and y [rows, outputs], bfloat16."""
    x = torch.randn((rows, columns), device=DEVICE, dtype=torch.bfloat16)
    return x, torch.randn((rows, outputs), device=DEVICE, dtype=torch.bfloat16)
