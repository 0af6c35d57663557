"""Long segments in one launch: a GEMM whose weight, the sum of base and delta, is made in registers (decision 023)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from math import gcd

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from deltazip_kernels.device.fused import LOW, TALL, fused
from deltazip_kernels.device.fused_operand import BK, BN
from deltazip_kernels.device.fused_share import LOW_COST, TALL_COST
from deltazip_kernels.fp8 import Fp8Matrix
from deltazip_kernels.launch import ceil_div, launch
from deltazip_kernels.layout import GROUP
from deltazip_kernels.table import CODEC_IDS, DeltaTable

FUSED_CODECS = ("int4", "int2")
FUSED_ROWS, FUSED_ALONE_ROWS = 128, 64
"""A segment of at least this many rows is cheaper here than with two products: in a step with other rows, and alone.
Measured on an H200 (``docs/kernels.md``)."""
SCRATCH_ROWS = {"int2": 4096, "int4": 2560}
"""By codec: a segment of at least this many rows is cheaper over a scratch weight, which costs the same for any."""
_MOST_PARTS = 3
_NO_TILE = 1 << 30
_OCCUPIED = 0.9
_PLACES = 8
_SHARERS = 4
_STAGES = 4
"""Steps in flight: as many as fit into the shared memory."""


@dataclass(frozen=True)
class RowTiles:
    """The long segments of a step, cut into ``tall`` tiles of 256 rows and ``low`` tiles of 128."""

    table: Tensor
    """``[tall + low, 4]`` int32 on the device: slot, first row, end of the segment, unused; tall tiles come first."""
    tall: int
    low: int
    slots: frozenset[int]
    """The slots of all segments."""


def cut_rows(segments: Sequence[tuple[int, int, int]], send: Callable[[list[list[int]]], Tensor]) -> RowTiles:
    """Cut segments, given as slot, first row and end; ``send`` makes an int32 tensor on the device."""
    tall: list[list[int]] = []
    low: list[list[int]] = []
    for slot, start, end in segments:
        for row in range(start, end, TALL.value):
            (low if end - row <= LOW.value else tall).append([slot, row, end, 0])
    return RowTiles(send(tall + low), len(tall), len(low), frozenset(slot for slot, _, _ in segments))


class FusedProduct:
    """``x (W + delta)^T`` for weights of one base. Launches share buffers, so one object belongs to one stream."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 0
        self._partials = torch.empty(self._programs * BN.value * (TALL.value + LOW.value), device=device)
        self._arrived = torch.zeros(2 * self._programs, dtype=torch.int32, device=device)
        """Flags of programs that have stored a part of a tile; zero between launches."""

    @property
    def available(self) -> bool:
        """Whether the GPU is a Hopper, for which the kernel is made."""
        return self._programs > 0

    def __call__(
        self, y: Tensor, x: Tensor, weight: Tensor | Fp8Matrix, table: DeltaTable, tiles: RowTiles
    ) -> set[int]:
        """Write the rows of ``tiles`` to ``y`` ``[T, N]`` for ``x`` ``[T, K]`` and ``weight`` ``[N, K]``.

        All are contiguous. Returns the slots whose rows are written; those of the others are undefined. A slot's rows
        are written if its deltas for all of the stacked linears are in FUSED_CODECS, the base is in bfloat16, the
        linears are whole tiles, and the kernel is available.
        """
        if not self.available or not isinstance(weight, Tensor) or not _fit(weight, table.shapes):
            return set()
        codecs = {slot: table.codecs_of(slot) for slot in tiles.slots}
        taken = {slot for slot, names in codecs.items() if names <= {*FUSED_CODECS}}
        for codec in sorted({name for slot in taken for name in codecs[slot] if name}):
            self._launch(y, x, weight, table, tiles, codec)
        return taken

    def _launch(self, y: Tensor, x: Tensor, weight: Tensor, table: DeltaTable, tiles: RowTiles, codec: str) -> None:
        """Launch the kernel for the tiles whose delta is in ``codec``."""
        ends = [blocks // BN.value for blocks in accumulate(rows for rows, _ in table.shapes[:-1])]
        width, groups = weight.shape[0] // BN.value, x.shape[1] // GROUP
        launch(
            fused,
            (self._programs,),
            _descriptor(y, LOW.value, BN.value),
            y,
            _descriptor(x, LOW.value, BK.value),
            _descriptor(weight, BN.value, BK.value),
            tiles.table,
            table.entries,
            len(table.shapes),
            width,
            *(*ends, _NO_TILE, _NO_TILE)[: _MOST_PARTS - 1],
            tiles.tall,
            tiles.low,
            *deal(tiles.tall * width, tiles.low * width, groups, self._programs),
            self._partials,
            self._arrived,
            x.shape[1],
            CODEC=CODEC_IDS[codec],
            STAGES=_STAGES,
            num_warps=8,
            launch_pdl=True,
        )


def _fit(weight: Tensor, shapes: Sequence[tuple[int, int]]) -> bool:
    whole = not any(rows % BN.value or columns % GROUP for rows, columns in shapes)
    return weight.dtype == torch.bfloat16 and whole and len(shapes) <= _MOST_PARTS


@lru_cache
def deal(tall: int, low: int, groups: int, multiprocessors: int) -> tuple[int, int, int]:
    """The number of programs for ``tall`` and ``low`` tiles of ``groups`` of columns, and how many of each they share.

    Tiles are whole if they are of one kind and occupy nearly all multiprocessors in every turn. Otherwise programs
    share the tiles of the last turn, split along K at few different places: programs at the same place read what others
    have just read. With both kinds and more than one turn and a half, idle programs would cost more than that gains, so
    all take part. If so few tiles are left that many programs would share each, they share one more turn.
    """
    tiles = tall + low
    most = min(multiprocessors, max(tiles * groups, 1))
    turns = ceil_div(tiles, multiprocessors)
    both = tall > 0 and low > 0
    if not both and ceil_div(tiles, max(turns, 1)) >= _OCCUPIED * multiprocessors:
        return ceil_div(tiles, turns), 0, 0
    fewest = most if both and 2 * tiles > 3 * most else ceil_div(19 * most, 20)
    counts = range(most, fewest - 1, -1)
    programs = next((count for count in counts if _places(tall % count, low % count, count) <= _PLACES), most)
    shared_tall, shared_low = tall % programs, low % programs
    if tall > programs and shared_tall and _SHARERS * _line(shared_tall, shared_low) < TALL_COST.value * programs:
        shared_tall += programs
    # The first sharer of a tile waits for all others, so each of them must have at least one group.
    enough = (shared_tall + shared_low) * groups * LOW_COST.value >= programs * TALL_COST.value
    return programs, *((shared_tall, shared_low) if enough else (0, 0))


def _line(tall: int, low: int) -> int:
    """The cost of all columns of these tiles."""
    return int(TALL_COST.value * tall + LOW_COST.value * low)


def _places(tall: int, low: int, programs: int) -> int:
    """The number of different places along K at which ``programs`` begin that share these tiles evenly."""
    costs = [cost.value * programs for cost, tiles in ((TALL_COST, tall), (LOW_COST, low)) if tiles]
    return max((cost // gcd(_line(tall, low), cost) for cost in costs), default=1)


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor with which the copy engine reads or writes blocks of ``rows`` by ``columns``."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], _layout(rows, columns))


@cache
def _layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
