"""One blob: the tensors of one block of a delta in a safetensors file, written and read in memory.

Keys are ``<weight>.codes``, ``<weight>.scales`` and, for sparse codecs, ``<weight>.index`` in the packed layout
of ``deltazip_kernels.layout``; ``<weight>.down`` and ``<weight>.up`` for low rank; ``<weight>`` itself for raw.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from deltazip_kernels.layout import packed_layout
from deltazip_ray.artifact.manifest import BlobEntry, TensorEntry
from deltazip_ray.errors import BlobCorrupt

ALIGNMENT = 64
"""The data of a blob starts at a multiple of this many bytes."""

_MAX_HEADER = 4 << 20
_RAW_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class _Piece(BaseModel):
    """One tensor in a safetensors header."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shape: Annotated[list[Annotated[int, Field(gt=0)]], Field(max_length=8)]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


_HEADER = TypeAdapter(dict[str, _Piece])


def write_blob(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of a safetensors file of ``tensors``; equal tensors give equal bytes.

    Not written with the safetensors library: a blob is named by its digest, so its bytes must not depend on the
    library's release, and releases have changed the order of tensors before.
    """
    # Widest elements first, so that every tensor is aligned to its element size without gaps.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    data = [_bytes_of(tensors[name]) for name in order]
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def read_blob(data: memoryview | bytes | bytearray, entry: BlobEntry) -> dict[str, torch.Tensor]:
    """The tensors of a blob as CPU views of ``data``; nothing is copied.

    Names, shapes, dtypes and bounds are checked against ``entry``; the digest is not (see ``digests``).
    Nobody may write to the views: ``data`` may be shared with other processes. Raises BlobCorrupt.
    """
    view = memoryview(data).cast("B")
    start, pieces = _read_header(view, entry)
    expected = expected_tensors(entry)
    if pieces.keys() != expected.keys():
        odd = min(pieces.keys() ^ expected.keys())
        raise BlobCorrupt(f"blob {entry.digest[:12]} and its manifest disagree on whether it holds {odd[:120]!r}")
    _check_cover(pieces, len(view) - start, entry)
    for name, piece in pieces.items():
        _check_piece(start, name, piece, expected[name], entry)
    whole = torch.from_numpy(np.asarray(_Alias(view)))
    typed = {name: _typed(whole, start, _DTYPES[name]) for name in {piece.dtype for piece in pieces.values()}}
    return {name: _view(typed[piece.dtype], piece) for name, piece in pieces.items()}


def expected_tensors(entry: BlobEntry) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """(shape, dtype) by key of every tensor that a blob must hold; dtype None: any float (raw weights)."""
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for weight, tensor in entry.tensors.items():
        if tensor.codec == "raw":
            expected[weight] = (tensor.shape, None)
            continue
        for part, (shape, dtype) in coded_layout(tensor).items():
            expected[f"{weight}.{part}"] = (shape, dtype)
    return expected


def coded_layout(entry: TensorEntry) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a weight that is not raw, by the suffix of its key."""
    rows, columns = entry.shape
    if entry.rank is not None:
        return {"down": ((entry.rank, columns), torch.bfloat16), "up": ((rows, entry.rank), torch.bfloat16)}
    return packed_layout(entry.codec, (rows, columns))


def _read_header(view: memoryview, entry: BlobEntry) -> tuple[int, dict[str, _Piece]]:
    """Offset of the data, and the tensors that the header describes."""
    if len(view) != entry.size:
        raise BlobCorrupt(
            f"blob {entry.digest[:12]} has {len(view)} bytes, not {entry.size}: publish the version again with --repair"
        )
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > min(_MAX_HEADER, len(view) - 8):
        raise BlobCorrupt(f"blob {entry.digest[:12]} has an impossible header length: it is not a safetensors file")
    try:
        return 8 + length, _HEADER.validate_json(bytes(view[8 : 8 + length]))
    except ValidationError as error:
        raise BlobCorrupt(f"blob {entry.digest[:12]} has a malformed header: {error.errors()[0]['msg']}") from error


def _check_cover(pieces: Mapping[str, _Piece], size: int, entry: BlobEntry) -> None:
    """Check that every byte of the data belongs to exactly one tensor."""
    position = 0
    for begin, end in sorted(piece.data_offsets for piece in pieces.values()):
        if begin != position or end < begin:
            raise BlobCorrupt(f"blob {entry.digest[:12]} has overlapping tensors or gaps at byte {position}")
        position = end
    if position != size:
        raise BlobCorrupt(f"blob {entry.digest[:12]} has {size} bytes of data, but its header describes {position}")


def _check_piece(
    start: int, name: str, piece: _Piece, expected: tuple[tuple[int, ...], torch.dtype | None], entry: BlobEntry
) -> None:
    """Check a tensor's shape, dtype, size and alignment against the manifest; the data starts at ``start``."""
    shape, dtype = expected
    found = _DTYPES.get(piece.dtype)
    begin, end = piece.data_offsets
    if found is None or tuple(piece.shape) != shape or (found not in _RAW_DTYPES if dtype is None else found != dtype):
        raise BlobCorrupt(
            f"blob {entry.digest[:12]}: {name} is {piece.dtype} {piece.shape}, "
            f"but its manifest says {dtype or 'floats'} {list(shape)}"
        )
    if end - begin != math.prod(shape) * found.itemsize or begin % found.itemsize or start % found.itemsize:
        raise BlobCorrupt(f"blob {entry.digest[:12]}: the bytes of {name} do not fit its shape, or are not aligned")


def _typed(whole: torch.Tensor, start: int, dtype: torch.dtype) -> torch.Tensor:
    """The data from ``start`` on, viewed as ``dtype``; a remainder at the end is left out."""
    return whole[start : len(whole) - (len(whole) - start) % dtype.itemsize].view(dtype)


def _view(data: torch.Tensor, piece: _Piece) -> torch.Tensor:
    """One tensor of the data, made with a single torch call: a delta has hundreds."""
    offset = data.storage_offset() + piece.data_offsets[0] // data.itemsize
    return data.as_strided(piece.shape, _strides(tuple(piece.shape)), offset)


@lru_cache(1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class _Alias:
    """A buffer that claims to be writable: torch warns about read-only ones, and nobody writes to a blob."""

    def __init__(self, source: memoryview) -> None:
        self.source = source
        interface = np.frombuffer(source, np.uint8).__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
