"""The grouped delta product: packed layouts, torch references, kernels."""

from deltazip_kernels.layout import (
    CODECS,
    GROUP,
    LAYOUT_VERSION,
    Codec,
    pack,
    packed_bytes,
    packed_layout,
    unpack,
    unpack_rows,
)
from deltazip_kernels.ops import LOW_RANK, RAW, PackedDelta, Segments, delta_matmul

__all__ = [
    "CODECS",
    "GROUP",
    "LAYOUT_VERSION",
    "LOW_RANK",
    "RAW",
    "Codec",
    "PackedDelta",
    "Segments",
    "delta_matmul",
    "pack",
    "packed_bytes",
    "packed_layout",
    "unpack",
    "unpack_rows",
]
