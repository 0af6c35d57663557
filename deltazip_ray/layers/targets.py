"""Where versions put their weights: one target for each weight of the base, with a place for each slot.

Loader threads install and clear slots while steps run. That is safe because no row of a running step uses a slot before
it is published. Small values are only noted in ``writes``; the loader sends all of them together.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from deltazip_kernels import RAW, PackedDelta
from deltazip_ray.layers.activations import BaseWeight, dense
from deltazip_ray.layers.stack import DeltaStack
from deltazip_ray.layers.writes import Writes

VALUES = "values"


class DeltaTarget(ABC):
    """A weight of the base that a version may change."""

    in_slot: bool
    """Whether :meth:`install` keeps views of the tensors it is given (they must then live in the slot)."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name = name
        self.shape = shape

    @abstractmethod
    def install(self, slot: int, codec: str, tensors: Mapping[str, torch.Tensor], writes: Writes) -> None:
        """Use a version's weight, in the tensors of its codec, for the rows of ``slot``."""

    @abstractmethod
    def clear(self, slot: int, writes: Writes) -> None:
        """Use the base alone for the rows of ``slot``."""


class MatrixTarget(DeltaTarget):
    """A matrix ``[out, in]`` whose delta is added: coded, or raw values that replace the base's."""

    in_slot = True

    def __init__(self, name: str, base: BaseWeight, stack: DeltaStack, part: int) -> None:
        """``base`` ``[out, in]`` may be a slice of a fused weight; its deltas are part ``part`` of ``stack``."""
        super().__init__(name, tuple(base.shape))
        self.base = base
        self.stack = stack
        self.part = part

    @property
    def deltas(self) -> list[PackedDelta | None]:
        """By slot."""
        return self.stack.deltas[self.part]

    def install(self, slot: int, codec: str, tensors: Mapping[str, torch.Tensor], writes: Writes) -> None:
        """Keep views of ``tensors``; raw values become their difference to the base, in place."""
        if codec == RAW:
            tensors[VALUES].sub_(dense(self.base, tensors[VALUES].dtype))
        delta = PackedDelta(codec, (self.base.shape[0], self.base.shape[1]), tensors)
        self.stack.put(slot, self.part, delta, writes)

    def clear(self, slot: int, writes: Writes) -> None:
        """Drop the views."""
        self.stack.put(slot, self.part, None, writes)


class VectorTarget(DeltaTarget):
    """A vector ``[size]`` (norm weight, bias), raw. ``table[0]`` is the base's, ``table[slot + 1]`` the slot's."""

    in_slot = False

    def __init__(self, name: str, base: torch.Tensor, table: torch.Tensor) -> None:
        """``table`` ``[slots + 1, size]`` may be a column slice of a wider one; its rows are set to ``base``."""
        super().__init__(name, tuple(base.shape))
        self.table = table
        self.table.copy_(base.expand_as(table))
        self._rows = table.unbind()

    def install(self, slot: int, codec: str, tensors: Mapping[str, torch.Tensor], writes: Writes) -> None:
        """Copy the values into the slot's row."""
        writes.put(self._rows[slot + 1], tensors[VALUES])

    def clear(self, slot: int, writes: Writes) -> None:
        """Restore the base's values."""
        writes.put(self._rows[slot + 1], self._rows[0])


class AddedTarget(DeltaTarget):
    """Rows for tokens beyond the base's vocabulary, raw ``[added, hidden]``, up to ``max_added`` a version."""

    in_slot = False

    def __init__(self, name: str, table: torch.Tensor) -> None:
        """``table``: ``[slots + 1, max_added, hidden]``; row 0, the base's, stays unused."""
        super().__init__(name, tuple(table.shape[1:]))
        self.table = table
        self.counts = torch.zeros(len(table), dtype=torch.int32, device=table.device)
        """``[slots + 1]``: how many rows each has."""
        self.width = 0
        """The most rows that any version had so far."""

    def install(self, slot: int, codec: str, tensors: Mapping[str, torch.Tensor], writes: Writes) -> None:
        """Copy the rows into the slot's place."""
        values = tensors[VALUES]
        writes.put(self.table[slot + 1, : len(values)], values)
        writes.put(self.counts[slot + 1], [len(values)])
        self.width = max(self.width, len(values))

    def clear(self, slot: int, writes: Writes) -> None:
        """Set the slot's number of added rows to 0."""
        writes.put(self.counts[slot + 1], [0])
