"""Collects the contents of one blob, and rebuilds weights from them."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from deltazip_kernels.layout import ROWS, pack, unpack, unpack_rows
from deltazip_ray.artifact.blob import coded_layout
from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.artifact.manifest import TensorEntry
from deltazip_ray.compress.adapter import LowRank
from deltazip_ray.compress.coding import Outcome
from deltazip_ray.compress.grid import Coded
from deltazip_ray.compress.options import Coding

PACKED = 256 * ROWS
"""Rows packed at a time, to limit the memory for matrices with the size of the vocabulary."""
ADDED = ".added"
"""Suffix of the rows that a fine-tune adds to a matrix of the vocabulary."""


class Parts:
    """Entries and tensors of one blob; ``tensors`` has the keys of a blob."""

    def __init__(self, finetuned: Checkpoint) -> None:
        self._finetuned = finetuned
        self.entries: dict[str, TensorEntry] = {}
        self.tensors: dict[str, Tensor] = {}

    def add_raw(self, name: str, values: Tensor) -> None:
        """Keep a weight of the fine-tune as it is."""
        self.entries[name] = TensorEntry(
            codec="raw", shape=tuple(values.shape), bytes_finetuned=self._before(name, values)
        )
        self.tensors[name] = values.cpu().contiguous()

    def add(self, name: str, outcome: Outcome, finetuned: Tensor) -> None:
        """Keep the coded delta of a matrix, whose values in the fine-tune are ``finetuned``."""
        if outcome.coding == "raw":
            self.add_raw(name, finetuned)
        elif outcome.factors is not None:
            self.add_factors(name, outcome.factors, outcome.error)
        elif outcome.coded is not None:
            self.add_coded(name, outcome.coded, outcome.coding, outcome.error)

    def add_coded(self, name: str, coded: Coded, codec: Coding, error: float) -> None:
        """Keep a coded delta; ``error`` is the relative output error of the rebuilt weight."""
        shape = (coded.codes.shape[0], coded.codes.shape[1])
        before = self._before(name, coded.codes)
        self.entries[name] = TensorEntry.model_validate(
            {"codec": codec, "shape": shape, "bytes_finetuned": before, "relative_error": error}
        )
        pieces = [coded.rows(slice(start, start + PACKED)) for start in range(0, shape[0], PACKED)]
        packed = [pack(codec, piece.codes, piece.scales, piece.kept) for piece in pieces]
        for part in packed[0]:
            self.tensors[f"{name}.{part}"] = torch.cat([piece[part].cpu() for piece in packed])

    def add_factors(self, name: str, factors: LowRank, error: float) -> None:
        """Keep a product as its factors; ``error`` as in :meth:`add_coded`."""
        self.entries[name] = TensorEntry(
            codec="low_rank",
            shape=factors.shape,
            bytes_finetuned=prod(factors.shape) * self._finetuned.dtype(name).itemsize,
            relative_error=error,
            rank=factors.down.shape[0],
        )
        self.tensors |= {f"{name}.down": factors.down.cpu(), f"{name}.up": factors.up.cpu()}

    def _before(self, name: str, values: Tensor) -> int:
        """Bytes of ``values`` as the fine-tune's checkpoint stores them."""
        return values.numel() * self._finetuned.dtype(name.removesuffix(ADDED)).itemsize


def rebuild(name: str, base: Tensor, entries: Mapping[str, TensorEntry], tensors: Mapping[str, Tensor]) -> Tensor:
    """The reconstruction of weight ``name``: base plus delta, or the raw values, with added rows below.

    ``base`` is the weight as stored, on the device of the result. The result is ``base`` itself if the delta does not
    contain the weight, raw values in their own dtype, and float32 otherwise. ``tensors`` has the keys of a blob.
    """
    added = tensors.get(name + ADDED)
    entry = entries.get(name)
    weight = base
    if entry is not None and entry.codec == "raw":
        weight = tensors[name].to(base.device)
    elif entry is not None:
        parts = {part: tensor.to(base.device) for part, tensor in packed(name, tensors, entry).items()}
        weight = base.float() + _delta(entry, parts)
    return weight if added is None else torch.cat([weight.float(), added.to(base.device).float()])


def rebuild_rows(name: str, base: Tensor, rows: Tensor, parts: Parts) -> Tensor:
    """Rows ``[T]`` of :func:`rebuild`, float32 ``[T, K]``, without computing the rest of the matrix."""
    old = rows < base.shape[0]
    values = torch.empty(rows.shape[0], base.shape[1])
    values[old] = base[rows[old]].float()
    entry = parts.entries.get(name)
    if entry is not None and entry.codec == "raw":
        values[old] = parts.tensors[name][rows[old]].float()
    elif entry is not None:
        found = packed(name, parts.tensors, entry)
        if entry.rank is None:
            values[old] += unpack_rows(entry.codec, found, (entry.shape[0], entry.shape[1]), rows[old])
        else:
            values[old] += LowRank(found["down"], found["up"][rows[old]]).product()
    if not bool(old.all()):
        values[~old] = parts.tensors[name + ADDED][rows[~old] - base.shape[0]].float()
    return values


def base_rows(base: Tensor, finetuned: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[T]`` of the base, float32 ``[T, K]``; rows of added tokens are the fine-tune's."""
    old = (rows < len(base))[:, None]
    return torch.where(old, base[rows.clamp_max(len(base) - 1)].float(), finetuned[rows].float())


def rebuild_slice(name: str, base: Tensor, rows: slice, parts: Parts) -> Tensor:
    """A slice of :func:`rebuild` for rows that the base has; ``base`` is that slice, which starts at a whole tile."""
    entry = parts.entries.get(name)
    if entry is None:
        return base
    if entry.codec == "raw":
        return parts.tensors[name][rows].to(base.device)
    found = packed(name, parts.tensors, entry)
    if entry.rank is None:
        at = slice(rows.start // ROWS, -(-rows.stop // ROWS))
        here = {part: tensor[at].to(base.device) for part, tensor in found.items()}
        return base.float() + unpack(entry.codec, here, (len(base), base.shape[1]))
    return base.float() + LowRank(found["down"].to(base.device), found["up"][rows].to(base.device)).product()


def packed(name: str, tensors: Mapping[str, Tensor], entry: TensorEntry) -> dict[str, Tensor]:
    """The packed tensors of one coded weight."""
    return {part: tensors[f"{name}.{part}"] for part in coded_layout(entry)}


def _delta(entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
    """The delta that the parts of a coded weight represent, float32 ``[N, K]``."""
    if entry.rank is not None:
        return LowRank(parts["down"], parts["up"]).product()
    return unpack(entry.codec, parts, (entry.shape[0], entry.shape[1]))
