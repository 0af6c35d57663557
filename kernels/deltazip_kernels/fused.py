"""Long segments in one launch: a product with the sum of base and delta, which is made in registers tile by tile."""

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
"""From so many rows on a segment is cheaper by itself than within the base's product, with a delta's beside that: among
other rows, which keep the base's product, and without. Measured on an H200 (``docs/kernels.md``)."""
SCRATCH_ROWS = {"int2": 4096, "int4": 2560}
"""From so many on a segment whose deltas are in this codec is cheaper over a scratch weight, which is made in the same
time for any number of rows."""
_MOST_PARTS = 3
_NO_TILE = 1 << 30
_OCCUPIED = 0.9
_PLACES = 8
_SHARERS = 4
_STAGES = 4
"""Steps under way at once: what fits into the shared memory."""


@dataclass(frozen=True)
class RowTiles:
    """How a step's long segments are cut: ``table`` [tall + low, 4] int32 on the device has the slot, first row, end of
    the segment (and nothing) of ``tall`` tiles of 256 rows, then of ``low`` ones of 128."""

    table: Tensor
    tall: int
    low: int
    slots: frozenset[int]
    """Those of the segments."""


def cut_rows(segments: Sequence[tuple[int, int, int]], send: Callable[[list[list[int]]], Tensor]) -> RowTiles:
    """Row tiles of segments of a slot, first row and end; ``send`` makes an int32 tensor on the device."""
    tall: list[list[int]] = []
    low: list[list[int]] = []
    for slot, start, end in segments:
        for row in range(start, end, TALL.value):
            (low if end - row <= LOW.value else tall).append([slot, row, end, 0])
    return RowTiles(send(tall + low), len(tall), len(low), frozenset(slot for slot, _, _ in segments))


class FusedProduct:
    """``x (W + delta)^T`` for weights of one base. Launches of one object must not overlap: one stream at a time."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 0
        self._partials = torch.empty(self._programs * BN.value * (TALL.value + LOW.value), device=device)
        self._arrived = torch.zeros(2 * self._programs, dtype=torch.int32, device=device)
        """Programs that have left a part of a tile; zero between launches."""

    @property
    def available(self) -> bool:
        """Whether there is a GPU that the kernel is made for."""
        return self._programs > 0

    def __call__(
        self, y: Tensor, x: Tensor, weight: Tensor | Fp8Matrix, table: DeltaTable, tiles: RowTiles
    ) -> set[int]:
        """Write the rows of ``tiles`` of ``y`` ``[T, N]`` for ``x`` ``[T, K]``, ``weight`` ``[N, K]``, all contiguous.

        Returns the slots for which it has: those whose deltas for all the stacked linears are of FUSED_CODECS, if the
        base is in bfloat16, the linears are whole tiles, and the GPU is a Hopper one. Others' rows are undefined.
        """
        if not self.available or not isinstance(weight, Tensor) or not _fit(weight, table.shapes):
            return set()
        codecs = {slot: table.codecs_of(slot) for slot in tiles.slots}
        taken = {slot for slot, names in codecs.items() if names <= {*FUSED_CODECS}}
        for codec in sorted({name for slot in taken for name in codecs[slot] if name}):
            self._launch(y, x, weight, table, tiles, codec)
        return taken

    def _launch(self, y: Tensor, x: Tensor, weight: Tensor, table: DeltaTable, tiles: RowTiles, codec: str) -> None:
        """Of the tiles those whose delta is in ``codec``."""
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
    """How many programs take part in these tiles of so many ``groups`` of columns, and how many tall and low ones they
    share.

    Tiles of one kind are whole where that occupies nearly all multiprocessors; else programs share what is left of the
    last turn, at few different places along K: those at the same one read what others have just read. In many turns of
    both kinds that counts for less than programs that idle. Where so little is left that many would share a tile, one
    of them adding up what the others leave, they share a turn more.
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
    # Who collects from the sharers of a tile waits for all of them: each has to have a group at least.
    enough = (shared_tall + shared_low) * groups * LOW_COST.value >= programs * TALL_COST.value
    return programs, *((shared_tall, shared_low) if enough else (0, 0))


def _line(tall: int, low: int) -> int:
    """What all columns of so many tiles take."""
    return int(TALL_COST.value * tall + LOW_COST.value * low)


def _places(tall: int, low: int, programs: int) -> int:
    """At how many places along K those of ``programs`` begin that share these tiles evenly."""
    costs = [cost.value * programs for cost, tiles in ((TALL_COST, tall), (LOW_COST, low)) if tiles]
    return max((cost // gcd(_line(tall, low), cost) for cost in costs), default=1)


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """How the copy engine sees ``tensor``, in blocks of ``rows`` by ``columns``."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], _layout(rows, columns))


@cache
def _layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
