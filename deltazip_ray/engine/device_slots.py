"""Device memory for deltas: one preallocated buffer, cut into slots, into which blobs are copied as they are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deltazip_kernels import LAYOUT_VERSION, RAW, packed_layout
from deltazip_ray.artifact.blob import read_blob
from deltazip_ray.artifact.manifest import Manifest, TensorEntry
from deltazip_ray.errors import BaseMismatch, DeltaTooLarge, ManifestInvalid
from deltazip_ray.layers.targets import VALUES, AddedTarget, DeltaTarget, MatrixTarget
from deltazip_ray.models.weights import Placement
from deltazip_ray.residency.tiers import HostDelta

ALIGNMENT = 256
"""Bytes; what a tensor in a slot starts at a multiple of."""


@dataclass(frozen=True)
class BaseIdentity:
    """What a delta must agree with."""

    digest: str
    vocab_size: int


def default_slot_bytes(targets: Mapping[str, DeltaTarget]) -> int:
    """Room for a delta with every matrix in int4, the largest of the codecs."""
    return sum(_room("int4", target.shape, torch.uint8) for target in targets.values() if target.in_slot)


class DeviceSlots:
    """Which bytes of which slot belong to which weight. Each slot is filled by one thread at a time."""

    def __init__(
        self, targets: Mapping[str, DeltaTarget], placement: Placement, base: BaseIdentity, slot_bytes: int | None
    ) -> None:
        self.targets = targets
        self.base = base
        self.dtype = placement.dtype
        self.max_added = placement.max_added
        self.slot_bytes = slot_bytes or default_slot_bytes(targets)
        self.memory = torch.empty(
            placement.slots, _aligned(self.slot_bytes), dtype=torch.uint8, device=placement.device
        )
        self._vocab = [base.vocab_size] * placement.slots

    def vocab_size(self, slot: int) -> int:
        """Tokens that the version in ``slot`` knows."""
        return self._vocab[slot]

    def check(self, manifest: Manifest) -> None:
        """Raise unless a version belongs to this base, names its weights and fits a slot.

        BaseMismatch, ManifestInvalid, DeltaTooLarge.
        """
        if manifest.base.digest != self.base.digest:
            raise BaseMismatch(
                f"the delta belongs to base {manifest.base.digest[:12]}, this engine serves {self.base.digest[:12]}: "
                "compress the fine-tune against the base that is served"
            )
        if manifest.layout_version != LAYOUT_VERSION:
            raise ManifestInvalid(
                f"the delta has layout {manifest.layout_version}, this engine reads {LAYOUT_VERSION}: compress it again"
            )
        entries: dict[str, TensorEntry] = {}
        for blob in manifest.blobs:
            if not entries.keys().isdisjoint(blob.tensors):
                raise ManifestInvalid(f"the delta has a weight of block {blob.block} twice: compress it again")
            entries |= blob.tensors
        for name, entry in entries.items():
            self._check_entry(name, entry, manifest.added_tokens)
        self._check_added(entries, manifest.added_tokens)
        needed = sum(_room(e.codec, e.shape, self.dtype) for name, e in entries.items() if self.targets[name].in_slot)
        if needed > self.slot_bytes:
            raise DeltaTooLarge(
                f"the delta takes {needed} bytes of a slot of {self.slot_bytes}: "
                "raise engine.slot_bytes, or compress it with fewer bits"
            )

    def load(self, slot: int, delta: HostDelta) -> None:
        """Copy a checked version into ``slot`` and publish it there; returns when its bytes have arrived.

        Nothing of the version is visible before all of it was read. Raises BlobCorrupt.
        """
        # Whoever was here before is gone, also when this fails half-way.
        for target in self.targets.values():
            target.clear(slot)
        memory, start = self.memory[slot], 0
        installs = []
        for blob in delta.manifest.blobs:
            tensors = read_blob(delta.blobs[blob.block], blob)
            for name, entry in blob.tensors.items():
                target, parts = self.targets[name], _parts(name, entry, tensors)
                if target.in_slot:
                    parts, start = self._place(parts, entry, memory, start)
                installs.append((target, entry.codec, parts))
        for target, codec, parts in installs:
            target.install(slot, codec, parts)
        self._vocab[slot] = self.base.vocab_size + delta.manifest.added_tokens

    def _place(
        self, parts: dict[str, torch.Tensor], entry: TensorEntry, memory: torch.Tensor, start: int
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Copies of ``parts`` in ``memory`` from byte ``start`` on, and where the next weight may begin."""
        placed = {}
        for part, tensor in parts.items():
            dtype = self.dtype if entry.codec == RAW else tensor.dtype
            size = tensor.numel() * dtype.itemsize
            placed[part] = memory[start : start + size].view(dtype).view(tensor.shape)
            placed[part].copy_(tensor)
            start += _aligned(size)
        return placed, start

    def _check_entry(self, name: str, entry: TensorEntry, added: int) -> None:
        target = self.targets.get(name)
        if target is None:
            raise ManifestInvalid(f"the delta changes {name}, which this base does not have: compress it again")
        shape = (added, *target.shape[1:]) if isinstance(target, AddedTarget) else target.shape
        if entry.shape != shape:
            raise ManifestInvalid(f"the delta has {name} as {list(entry.shape)}, not {list(shape)}: compress it again")
        if entry.codec != RAW and not isinstance(target, MatrixTarget):
            raise ManifestInvalid(f"the delta codes {name} as {entry.codec}, but only matrices are coded")

    def _check_added(self, entries: Mapping[str, TensorEntry], added: int) -> None:
        if added > self.max_added:
            raise DeltaTooLarge(
                f"the version adds {added} tokens, the engine has room for {self.max_added}: "
                "raise engine.max_added_tokens"
            )
        missing = [
            name for name, target in self.targets.items() if isinstance(target, AddedTarget) and name not in entries
        ]
        if added and missing:
            raise ManifestInvalid(f"the version adds {added} tokens but has no rows {missing[0]}: compress it again")


def _parts(name: str, entry: TensorEntry, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of one weight by their names in the packed layout."""
    if entry.codec == RAW:
        return {VALUES: tensors[name]}
    return {part: tensors[f"{name}.{part}"] for part in packed_layout(entry.codec, (entry.shape[0], entry.shape[1]))}


def _room(codec: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a slot that one matrix takes; raw ones are kept in ``dtype``."""
    if codec == RAW:
        return _aligned(math.prod(shape) * dtype.itemsize)
    layout = packed_layout(codec, (shape[0], shape[1]))
    return sum(_aligned(math.prod(dims) * part.itemsize) for dims, part in layout.values())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
