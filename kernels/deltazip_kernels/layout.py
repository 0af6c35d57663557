"""The packed layout: how the codes of one weight matrix lie in GPU memory, and so in an artifact's blobs.

A matrix ``[N, K]`` is cut into tiles of 64 rows x 128 columns (one scale group), padded at the far edges. Every packed
tensor begins with ``[row tiles, column tiles, ...]``, so a tensor-parallel shard is a slice of whole tiles.
``docs/layout.md`` draws the bytes of a tile.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import pad

LAYOUT_VERSION = 1
GROUP = 128
"""Columns of K that share one scale; also a tile's width."""
ROWS = 64
"""Rows of a tile."""
QUAD = 4
"""Columns of which a 2:4 sparse codec keeps two."""
QUADS = GROUP // QUAD


@dataclass(frozen=True)
class Codec:
    """How a weight is coded: ``weight = (code - zero) * scale`` with codes of ``bits`` bits.

    ``zero`` is the middle of the codes or half a code below it.
    A ``sparse`` codec keeps two of every four consecutive columns; the others are zero.
    """

    name: str
    bits: int
    zero: float
    sparse: bool = False

    @property
    def flip(self) -> int:
        """The code's top bit: it is stored flipped, which makes a code a two's complement level."""
        return 1 << (self.bits - 1)

    @property
    def high(self) -> int:
        """The bits of a code that lie in ``codes``: a third bit, which would straddle bytes, lies in ``low``."""
        return 2 if self.bits == 3 else self.bits

    @property
    def planes(self) -> int:
        """How many levels of one row and group share a byte lane of ``codes``."""
        return 2 if self.sparse or self.high == 4 else 4

    @property
    def unit(self) -> int:
        """What a level of one is as a byte: codes unpack to the top bits of an int8, without a subtraction."""
        return 1 << (8 - self.bits)

    @property
    def half(self) -> int:
        """The bit below a code in that byte, set where ``zero`` lies between two codes."""
        return self.unit // 2 if self.zero % 1 else 0


CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("int4", bits=4, zero=8.0),
        Codec("int3", bits=3, zero=3.5),
        Codec("int2", bits=2, zero=1.5),
        Codec("int1", bits=1, zero=0.5),
        Codec("sparse24_int4", bits=4, zero=8.0, sparse=True),
        Codec("sparse24_int2", bits=2, zero=1.5, sparse=True),
    )
}


def find_codec(name: str) -> Codec:
    """The codec of that name; ValueError names those that exist."""
    try:
        return CODECS[name]
    except KeyError:
        raise ValueError(f"unknown codec {name!r}: use one of {', '.join(CODECS)}") from None


def tiles(shape: tuple[int, int]) -> tuple[int, int]:
    """Row tiles and column tiles of a matrix ``[N, K]``, the last ones padded."""
    rows, columns = shape
    if rows < 1 or columns < 1:
        raise ValueError(f"a packed matrix needs rows and columns, not {shape}")
    return -(-rows // ROWS), -(-columns // GROUP)


@lru_cache(1024)
def packed_layout(codec: str, shape: tuple[int, int]) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that :func:`pack` makes of a matrix ``[N, K]``."""
    kind, (row_tiles, column_tiles) = find_codec(codec), tiles(shape)
    half = (row_tiles, -(-column_tiles // 2), ROWS, QUADS)
    levels = GROUP // 2 if kind.sparse else GROUP
    codes = half if kind.planes * kind.high == 4 else (row_tiles, column_tiles, ROWS, levels // kind.planes)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": (codes, torch.uint8),
        "scales": ((row_tiles, column_tiles, ROWS), torch.bfloat16),
    }
    if kind.high < kind.bits:
        layout["low"] = (half, torch.uint8)
    if kind.sparse:
        layout["index"] = (half, torch.uint8)
    return MappingProxyType(layout)


def packed_bytes(codec: str, shape: tuple[int, int]) -> int:
    """Bytes of a packed matrix ``[N, K]``, all its tensors together, without alignment between them."""
    return sum(prod(dims) * dtype.itemsize for dims, dtype in packed_layout(codec, shape).values())


def pack(codec: str, codes: Tensor, scales: Tensor, kept: Tensor | None = None) -> dict[str, Tensor]:
    """Pack codes ``[N, K]`` (uint8) and scales ``[N, ceil(K / GROUP)]`` into tiles.

    ``kept`` ``[N, K]`` (bool) belongs to sparse codecs: at most two of four consecutive columns; codes elsewhere are
    ignored. Scales are rounded to bf16, so a quantizer rounds them before it chooses codes.
    Raises ValueError for what does not fit the codec.
    """
    kind = find_codec(codec)
    shape = (codes.shape[0], codes.shape[1])
    row_tiles, column_tiles = tiles(shape)
    _check_input(kind, codes, scales, kept)
    edge = (0, column_tiles * GROUP - shape[1], 0, row_tiles * ROWS - shape[0])
    levels = _to_tiles(pad(codes ^ kind.flip, edge))
    by_tile = pad(scales.to(torch.bfloat16), (0, 0, 0, edge[3])).view(row_tiles, ROWS, column_tiles).mT
    packed = {"scales": by_tile[..., _scale_order(scales.device)].contiguous()}
    if kept is None:
        values = to_positions(levels)
    else:
        values, bitmap = _select(torch.unflatten(levels, -1, (QUADS, QUAD)), _to_tiles(pad(kept, edge)))
        packed["index"] = _pair(bitmap)
    low = kind.bits - kind.high
    lanes = _join(values >> low, kind.high, kind.planes)
    packed["codes"] = _pair(lanes) if kind.planes * kind.high == 4 else lanes
    if low:
        packed["low"] = _pair(_join(values & 1, 1, kind.planes))
    return packed


def unpack(codec: str, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The dequantized delta ``[N, K]``, float32. Raises ValueError when ``packed`` is not laid out for ``shape``."""
    weights = from_positions(dequantize(codec, packed, shape))
    return weights[: shape[0], : shape[1]].contiguous()


def unpack_rows(codec: str, packed: Mapping[str, Tensor], shape: tuple[int, int], rows: Tensor) -> Tensor:
    """Rows ``[T]`` (int64) of the dequantized delta, float32 ``[T, K]``: reads those rows' bytes only."""
    kind = find_codec(codec)
    check_packed(codec, packed, shape)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < shape[0]:
        raise ValueError(f"rows must be in 0..{shape[0] - 1}")
    tile, row = rows // ROWS, rows % ROWS
    place = row // 16 * 16 + row % 8 * 2 + row // 8 % 2  # where _scale_order puts the row's scale
    picked = {name: tensor[tile, :, place if name == "scales" else row] for name, tensor in packed.items()}
    weights = _levels(kind, picked) * (picked["scales"].float() / kind.unit).unsqueeze(-1)
    return from_positions(weights.flatten(-2))[:, : shape[1]].contiguous()


def dequantize(codec: str, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The dequantized delta, float32, padded to whole tiles, its columns in the order of :func:`to_positions`."""
    kind = find_codec(codec)
    check_packed(codec, packed, shape)
    row_tiles, column_tiles = tiles(shape)
    # The product is written straight into row-major order: the only pass over the matrix that moves floats.
    device = packed["codes"].device
    weights = torch.empty((row_tiles, ROWS, column_tiles, GROUP), dtype=torch.float32, device=device)
    scales = _row_scales(packed["scales"]).float() / kind.unit
    torch.mul(_levels(kind, packed), scales.unsqueeze(-1), out=weights.transpose(1, 2))
    return weights.view(row_tiles * ROWS, column_tiles * GROUP)


def to_positions(columns: Tensor) -> Tensor:
    """``[..., K]`` from column order to the order in which a tile stores them; K a multiple of GROUP.

    Within a group, position ``32 p + q`` holds column ``4 q + p``: plane ``p`` of one 32-byte run has the columns
    ``p`` of all quads, so that dense and 2:4 codes meet the same order of activations.
    """
    return torch.unflatten(columns, -1, (-1, QUADS, QUAD)).transpose(-1, -2).flatten(-3)


def from_positions(positions: Tensor) -> Tensor:
    """The inverse of :func:`to_positions`."""
    return torch.unflatten(positions, -1, (-1, QUAD, QUADS)).transpose(-1, -2).flatten(-3)


def check_packed(codec: str, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    """Raise ValueError unless ``packed`` has exactly the tensors of :func:`packed_layout`."""
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()}
    wanted = packed_layout(codec, shape)
    if found != wanted:
        raise ValueError(f"packed tensors of a {codec} matrix {shape} must be {wanted}, not {found}")


def _check_input(kind: Codec, codes: Tensor, scales: Tensor, kept: Tensor | None) -> None:
    groups = -(-codes.shape[1] // GROUP)
    if codes.dtype != torch.uint8 or int(codes.max()) >> kind.bits:
        raise ValueError(f"{kind.name} takes uint8 codes below {1 << kind.bits}")
    if scales.shape != (codes.shape[0], groups):
        raise ValueError(f"scales must be [{codes.shape[0]}, {groups}], one a row and group, not {list(scales.shape)}")
    if not bool(scales.to(torch.bfloat16).isfinite().all()):
        raise ValueError("scales must be finite in bfloat16")
    if kind.sparse != (kept is not None):
        raise ValueError(f"{kind.name} {'needs' if kind.sparse else 'takes no'} mask of kept columns")
    if kept is None:
        return
    if kept.dtype != torch.bool or kept.shape != codes.shape:
        raise ValueError("the mask of kept columns must be bool, shaped as the codes")
    quads = torch.unflatten(pad(kept, (0, -kept.shape[1] % QUAD)), -1, (-1, QUAD))
    if int(quads.sum(-1).max()) > 2:
        raise ValueError("a 2:4 codec keeps at most two of every four columns")


def _scale_order(device: torch.device) -> Tensor:
    """The rows of a tile in the order of its scales: rows ``r`` and ``r + 8`` of 16 are neighbours, one 32-bit word.

    One thread of a tensor-core warp holds results of exactly these two rows.
    """
    return torch.arange(ROWS, device=device).view(-1, 2, 8).mT.flatten()


def _row_scales(scales: Tensor) -> Tensor:
    """Stored scales ``[..., ROWS]`` in the order of rows, as a view where possible."""
    return torch.unflatten(scales, -1, (-1, 8, 2)).mT.flatten(-3)


def _to_tiles(matrix: Tensor) -> Tensor:
    """Padded ``[N, K]`` to ``[row tiles, column tiles, ROWS, GROUP]``."""
    return matrix.view(matrix.shape[0] // ROWS, ROWS, matrix.shape[1] // GROUP, GROUP).transpose(1, 2)


def _join(levels: Tensor, bits: int, planes: int) -> Tensor:
    """Levels ``[..., n]`` to lanes ``[..., m = n / planes]``: lane ``j`` has levels ``j, j + m, ...``, low first."""
    joined, *others = torch.unflatten(levels, -1, (planes, -1)).unbind(-2)
    for i, plane in enumerate(others, start=1):
        joined = joined | plane << (bits * i)
    return joined.contiguous()


def _split(lanes: Tensor, bits: int, planes: int) -> Tensor:
    """The inverse of :func:`_join`, each level moved to the top bits of its byte."""
    shifts = torch.arange(8 - bits, 8 - bits * (planes + 1), -bits, dtype=torch.uint8, device=lanes.device)
    levels = (lanes.unsqueeze(-2) << shifts.unsqueeze(-1)) & (0x100 - (1 << (8 - bits)))
    return levels.flatten(-2)


def _pair(nibbles: Tensor) -> Tensor:
    """Half bytes ``[row tiles, column tiles, ROWS, lanes]`` to bytes of two groups, the even one's bits below."""
    even = nibbles[:, 0::2]
    odd = pad(nibbles[:, 1::2], (0, 0, 0, 0, 0, nibbles.shape[1] % 2))
    return (even | odd << 4).contiguous()


def _unpair(joined: Tensor, groups: int) -> Tensor:
    """The inverse of :func:`_pair`, over ``[n, pairs of groups, ..., lanes]``; upper halves may hold anything."""
    return torch.stack((joined & 0xF, joined >> 4), dim=2).flatten(1, 2)[:, :groups]


def _select(levels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right kept level of each quad, ``[..., 2 * QUADS]`` (all left, then all right), and its bitmap.

    A quad that keeps one column has its level on both sides: either is right wherever it is read.
    """
    mask = torch.unflatten(kept, -1, (QUADS, QUAD)).to(torch.uint8)
    # The kept column furthest left has the largest product with 4, 3, 2, 1, the one furthest right with 1, 2, 3, 4.
    weights = torch.arange(1, QUAD + 1, dtype=torch.uint8, device=kept.device)
    left, right = (mask * weights.flip(0)).argmax(-1), (mask * weights).argmax(-1)
    pair = (levels * mask).gather(-1, torch.stack((left, right), dim=-1))
    bitmap = (mask << (weights - 1)).sum(-1).to(torch.uint8)
    return pair.transpose(-1, -2).flatten(-2), bitmap


def _levels(kind: Codec, packed: Mapping[str, Tensor]) -> Tensor:
    """``(code - zero) * kind.unit`` of every position, int8 ``[..., GROUP]``, from bytes ``[..., bytes]``."""
    groups = packed["scales"].shape[1]
    codes = packed["codes"] if kind.planes * kind.high == 8 else _unpair(packed["codes"], groups)
    levels = _split(codes, kind.high, kind.planes) | kind.half
    if "low" in packed:
        levels |= _split(_unpair(packed["low"], groups), 1, kind.planes) >> kind.high
    if not kind.sparse:
        return levels.view(torch.int8)
    left, right = torch.unflatten(levels, -1, (2, QUADS)).unbind(-2)
    bitmap = _unpair(packed["index"], groups)
    m0, m1, m2, m3 = (((bitmap >> p) & 1) * 0xFF for p in range(QUAD))
    # At most two bits are set: column 1 is the right kept one if column 0 is kept, column 2 the left if column 3 is.
    planes = (
        m0 & left,
        m1 & ((m0 & right) | (~m0 & left)),
        m2 & ((m3 & left) | (~m3 & right)),
        m3 & right,
    )
    return torch.cat(planes, dim=-1).view(torch.int8)
