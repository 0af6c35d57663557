"""The table of pointers through which kernels find the deltas of one linear, or of several that share their input."""

from collections.abc import Sequence

import torch

from deltazip_kernels.delta import LOW_RANK, RAW, PackedDelta
from deltazip_kernels.layout import CODECS

FIELDS = 4
CODEC_IDS = {name: 1 + i for i, name in enumerate((*CODECS, RAW, LOW_RANK))}
"""Kernels identify codecs by these numbers; 0 is an empty slot."""


class DeltaTable:
    """The codec and the addresses of the tensors of each slot and part; a part is one of the linears of ``shapes``.

    ``entries`` [slots, parts, FIELDS] int64 is on the device. An entry is the id of the codec, followed by the
    addresses of codes, scales, and index or low bits; for a raw delta, of its values; for a low-rank one, of down and
    up, and the rank. A slot is set in stream order, so a captured graph sees the change at its next replay. The table
    keeps the tensors it points to alive.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], slots: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """``shapes`` ``[N_i, K]`` of linears whose outputs lie side by side. Raw and low-rank deltas have ``dtype``."""
        if not shapes or len({columns for _, columns in shapes}) != 1:
            raise ValueError("the linears of one table share their input: give shapes of one K")
        self.shapes = tuple(shapes)
        self.dtype = dtype
        self.entries = torch.zeros((max(slots, 1), len(shapes), FIELDS), dtype=torch.int64, device=device)
        self.rows = [slot.unbind() for slot in self.entries.unbind()]
        """``rows[slot][part]`` is ``entries[slot, part]``: views made once, as making one takes a while."""
        self._held: list[list[PackedDelta | None]] = [[None] * len(shapes) for _ in range(slots)]

    @property
    def codecs(self) -> tuple[str, ...]:
        """The codecs in the table now, in the order of CODEC_IDS."""
        present = {delta.codec for slot in self._held for delta in slot if delta is not None}
        return tuple(name for name in CODEC_IDS if name in present)

    def codecs_of(self, slot: int) -> set[str | None]:
        """The codecs of a slot's deltas; None for a part without one."""
        return {None if delta is None else delta.codec for delta in self._held[slot]}

    def set(self, slot: int, deltas: Sequence[PackedDelta | None]) -> None:
        """Put a delta, or None, for each part into ``slot``. Raises ValueError if a kernel could not read it."""
        if len(deltas) != len(self.shapes):
            raise ValueError(f"a slot of this table has {len(self.shapes)} parts, not {len(deltas)}")
        rows = [self._entry(delta, shape) for delta, shape in zip(deltas, self.shapes, strict=True)]
        self.entries[slot].copy_(torch.tensor(rows, dtype=torch.int64))
        self._held[slot] = list(deltas)

    def hold(self, slot: int, part: int, delta: PackedDelta | None) -> list[int]:
        """Keep ``delta`` alive, and return what the caller must write to ``rows[slot][part]``.

        For callers that write many entries at once. Raises as :meth:`set` does.
        """
        entry = self._entry(delta, self.shapes[part])
        self._held[slot][part] = delta
        return entry

    def _entry(self, delta: PackedDelta | None, shape: tuple[int, int]) -> list[int]:
        if delta is None:
            return [0] * FIELDS
        if delta.shape != shape:
            raise ValueError(f"a delta {delta.shape} does not fit a part of shape {shape}")
        if delta.codec == RAW:
            names = ["values"]
        elif delta.codec == LOW_RANK:
            names = ["down", "up"]
        else:
            names = ["codes", "scales", *(name for name in ("index", "low") if name in delta.tensors)]
        entry, device = [CODEC_IDS[delta.codec]], self.entries.device
        for name in names:
            tensor = delta.tensors[name]
            entry.append(tensor.data_ptr())
            if tensor.device != device or not tensor.is_contiguous() or entry[-1] % 16:
                raise ValueError(f"{name} must be contiguous, on {device}, at a multiple of 16 bytes")
            if tensor.numel() >= 1 << 31:
                raise ValueError(f"{name} has {tensor.numel()} elements: kernels count to 2**31; split the matrix")
            if delta.codec not in CODECS and tensor.dtype != self.dtype:
                raise ValueError(f"{name} must be {self.dtype} as the table, not {tensor.dtype}")
        if delta.codec == LOW_RANK:
            entry.append(delta.tensors["down"].shape[0])
        return entry + [0] * (FIELDS - len(entry))


def table_of(
    deltas: Sequence[PackedDelta | None], shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> DeltaTable:
    """A table of one part with a delta for each slot."""
    table = DeltaTable([shape], len(deltas), device, dtype)
    for slot, delta in enumerate(deltas):
        table.set(slot, [delta])
    return table
