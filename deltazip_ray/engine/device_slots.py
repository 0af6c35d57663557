"""Device memory for deltas: preallocated slots, into which blobs are copied without conversion."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from deltazip_kernels import LAYOUT_VERSION, LOW_RANK, RAW
from deltazip_ray.artifact.blob import coded_layout, read_blob
from deltazip_ray.artifact.manifest import BlobEntry, Manifest, TensorEntry
from deltazip_ray.engine.arrivals import Arrival, Mark, layer_of
from deltazip_ray.engine.codec_warm_up import CodecWarmUp
from deltazip_ray.engine.slot_layout import fill, room
from deltazip_ray.engine.uploads import Upload, Uploads
from deltazip_ray.errors import BaseMismatch, DeltaTooLarge, ManifestInvalid
from deltazip_ray.layers.targets import VALUES, AddedTarget, DeltaTarget, MatrixTarget
from deltazip_ray.layers.writes import Writes
from deltazip_ray.models.weights import Placement
from deltazip_ray.residency.tiers import HostDelta

_Weight = tuple[DeltaTarget, str, Mapping[str, torch.Tensor]]
"""(target, codec, tensors) of a weight."""


@dataclass(frozen=True)
class BaseIdentity:
    """The properties of the base that a delta must match."""

    digest: str
    vocab_size: int


def default_slot_bytes(targets: Mapping[str, DeltaTarget]) -> int:
    """Bytes of a delta with every matrix in int4, the largest codec."""
    return sum(room("int4", target.shape, torch.uint8) for target in targets.values() if target.in_slot)


class DeviceSlots:
    """Loads versions into slots. A slot is filled by one thread at a time."""

    def __init__(
        self,
        targets: Mapping[str, DeltaTarget],
        placement: Placement,
        base: BaseIdentity,
        slot_bytes: int | None,
        copy_bytes_per_s: float | None = None,
    ) -> None:
        """Does not allocate memory yet, see :attr:`memory`. ``copy_bytes_per_s`` limits all loads together."""
        self.targets = targets
        self.base = base
        self.dtype = placement.dtype
        self.max_added = placement.max_added
        self.slot_bytes = slot_bytes or default_slot_bytes(targets)
        self.memory = torch.empty((placement.slots, 0), dtype=torch.uint8, device=placement.device)
        """``[slots, at least slot_bytes]`` uint8. Set by the memory planner before the first load."""
        self.uploads = Uploads(placement.device, copy_bytes_per_s)
        self.idle: Callable[[], bool] = lambda: True
        """Whether no step is running. Set by the engine."""
        self.overlap = False
        """Whether steps may use a version that is still being copied, if the engine is idle otherwise."""
        self._vocab = [base.vocab_size] * placement.slots
        self._arriving: dict[int, Arrival] = {}
        self.warm_up = CodecWarmUp(targets, base.vocab_size)

    def vocab_size(self, slot: int) -> int:
        """Size of the vocabulary of the version in ``slot``."""
        return self._vocab[slot]

    def arriving(self, slots: Iterable[int]) -> list[Arrival]:
        """Versions that are still being copied to these slots, for steps that use them already. Thread-safe."""
        found = (self._arriving.get(slot) for slot in slots)
        return [arrival for arrival in found if arrival is not None]

    def check(self, manifest: Manifest) -> None:
        """Check that a version belongs to this base, matches its weights and fits into a slot.

        Raises BaseMismatch, ManifestInvalid, DeltaTooLarge.
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
        in_slot = [entry for name, entry in entries.items() if self.targets[name].in_slot]
        needed = sum(room(entry.codec, entry.shape, self.dtype, entry.rank) for entry in in_slot)
        if needed > self.slot_bytes:
            raise DeltaTooLarge(
                f"the delta takes {needed} bytes of a slot of {self.slot_bytes}: "
                "raise engine.slot_bytes, or compress it with fewer bits"
            )

    def load(self, slot: int, delta: HostDelta, usable: Callable[[], object] | None = None) -> None:
        """Copy a checked version into ``slot`` and publish it; returns when the device has all of it.

        Kernels for its codecs are compiled first. No launched step may read the slot. If overlapping is possible,
        ``usable`` is called before the end: from then on steps can be launched that wait for :meth:`arriving`.
        Raises BlobCorrupt, but never after calling ``usable``.
        """
        if delta.memory is not None:
            self.uploads.lock_pages(delta.memory)
        alone = self.idle()
        try:
            with self.uploads.beside_steps(gently=not alone) as upload:
                try:
                    self.warm_up.version(delta.manifest)
                    arrival = self._fill(slot, delta, upload)
                except BaseException:
                    self.clear(slot)
                    raise
                self._vocab[slot] = self.base.vocab_size + delta.manifest.added_tokens
                if alone and self.overlap and self.uploads.unbounded and usable is not None:
                    self._arriving[slot] = arrival
                    usable()
        finally:
            self._arriving.pop(slot, None)

    def clear(self, slot: int) -> None:
        """Remove a version from ``slot``, which no launched step may read."""
        writes = Writes()
        for target in self.targets.values():
            target.clear(slot, writes)
        writes.send()

    def _fill(self, slot: int, delta: HostDelta, upload: Upload) -> Arrival:
        """Enqueue the copies of a version's weights; weights that it does not change are reset to the base's."""
        untouched = dict(self.targets)
        late: list[_Weight] = []
        writes = Writes()
        marks: dict[int | None, Mark] = {}
        start = 0
        for blob in sorted(delta.manifest.blobs, key=_is_of_layers):
            weights, start = self._place(slot, start, blob, delta.blobs[blob.block], upload)
            marks |= dict.fromkeys(map(layer_of, blob.tensors), upload.mark())
            for target, codec, tensors in weights:
                del untouched[target.name]
                if target.in_slot and codec == RAW:
                    late.append((target, codec, tensors))  # installing it reads the copied values
                else:
                    target.install(slot, codec, tensors, writes)
        for target in untouched.values():
            target.clear(slot, writes)
        if late:
            upload.join()
        for target, codec, tensors in late:
            target.install(slot, codec, tensors, writes)
        writes.send()
        return Arrival(marks, self.uploads.event())

    def _place(
        self, slot: int, start: int, blob: BlobEntry, data: memoryview, upload: Upload
    ) -> tuple[list[_Weight], int]:
        """Enqueue the copies of a blob's weights to ``slot`` from byte ``start`` on, for targets inside slots.

        Returns the weights, and the start of the next blob.
        """
        tensors = read_blob(data, blob)
        parts = {name: _parts(name, entry, tensors) for name, entry in blob.tensors.items()}
        in_slot = {
            (name, part): tensor.to(self.dtype) if blob.tensors[name].codec in (RAW, LOW_RANK) else tensor
            for name, found in parts.items()
            for part, tensor in found.items()
            if self.targets[name].in_slot
        }
        copies, start = fill(self.memory[slot], start, in_slot, upload)
        for (name, part), copy in copies.items():
            parts[name][part] = copy
        return [(self.targets[name], entry.codec, parts[name]) for name, entry in blob.tensors.items()], start

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


def _is_of_layers(blob: BlobEntry) -> bool:
    """Whether all its weights belong to layers; other blobs are needed first."""
    return all(layer_of(name) is not None for name in blob.tensors)


def _parts(name: str, entry: TensorEntry, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of one weight by their names in the packed layout."""
    if entry.codec == RAW:
        return {VALUES: tensors[name]}
    return {part: tensors[f"{name}.{part}"] for part in coded_layout(entry)}
