"""Builds layers from a checkpoint: straight from safetensors to the device, projections fused."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from deltazip_ray.errors import CheckpointInvalid
from deltazip_ray.layers.linear import DeltaLinear
from deltazip_ray.layers.norm import DeltaHeadNorm, DeltaLayerNorm, DeltaRMSNorm, Norm
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.layers.targets import AddedTarget, DeltaTarget, MatrixTarget, VectorTarget
from deltazip_ray.models.decoder_config import NormKind


class WeightSource(Protocol):
    """Where weights come from: a checkpoint."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises CheckpointInvalid."""

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on any device. Raises CheckpointInvalid."""


@dataclass(frozen=True)
class Placement:
    """Where weights go and how many versions there is room for."""

    dtype: torch.dtype
    device: torch.device
    slots: int
    max_added: int
    """Rows that a version may add to the vocabulary."""
    ops: LayerOps = field(default_factory=LayerOps)


@dataclass
class WeightReader:
    """Reads weights once and keeps, by checkpoint name, where versions put theirs."""

    source: WeightSource
    placement: Placement
    targets: dict[str, DeltaTarget] = field(default_factory=dict)

    def matrix(self, name: str, shape: tuple[int, int]) -> MatrixTarget:
        """One matrix on its own. Raises CheckpointInvalid, as every method here does."""
        _, (target,) = self._fused([name], [shape[0]], shape[1])
        return target

    def linear(self, names: Sequence[str], outs: Sequence[int], inputs: int, *, bias: bool) -> DeltaLinear:
        """Modules ``names`` with ``outs`` outputs each, fused into one weight ``[sum(outs), inputs]``."""
        weight, targets = self._fused([f"{name}.weight" for name in names], outs, inputs)
        stack, ops = targets[0].stack, self.placement.ops
        if not bias:
            return DeltaLinear(weight, stack, ops)
        biases = self._empty(self.placement.slots + 1, sum(outs))
        for name, start, stop in zip(names, stack.starts, stack.starts[1:], strict=False):
            self._vector(f"{name}.bias", biases[:, start:stop])
        return DeltaLinear(weight, stack, ops, biases)

    def norm(self, name: str, size: int, kind: NormKind, eps: float) -> Norm:
        """The norm of rows of ``size`` columns in module ``name``."""
        weight, ops = self._whole_vector(f"{name}.weight", size), self.placement.ops
        if kind == "layer":
            return DeltaLayerNorm(weight, self._whole_vector(f"{name}.bias", size), eps, ops)
        return DeltaRMSNorm(weight, eps, ops, offset=kind == "rms_plus_one")

    def head_norm(self, names: tuple[str, str], size: int, eps: float) -> DeltaHeadNorm:
        """The norms of the heads of q and of k, which have ``size`` columns."""
        q, k = (self._whole_vector(f"{name}.weight", size) for name in names)
        return DeltaHeadNorm(q, k, eps)

    def added(self, name: str, hidden: int) -> AddedTarget:
        """Room for the rows that versions add to the matrix ``name``."""
        place = self.placement
        # Zeros, since rows that a version lacks are read, and then masked.
        table = torch.zeros(place.slots + 1, place.max_added, hidden, dtype=place.dtype, device=place.device)
        target = AddedTarget(f"{name}.added", table)
        self.targets[target.name] = target
        return target

    def _fused(self, names: Sequence[str], outs: Sequence[int], inputs: int) -> tuple[torch.Tensor, list[MatrixTarget]]:
        weight = self._empty(sum(outs), inputs)
        stack = self.placement.ops.stack([(size, inputs) for size in outs], self.placement.slots)
        targets = []
        for part, (name, size) in enumerate(zip(names, outs, strict=True)):
            rows = weight[stack.starts[part] : stack.starts[part + 1]]
            rows.copy_(self._read(name, (size, inputs)))
            targets.append(MatrixTarget(name, rows, stack, part))
            self.targets[name] = targets[-1]
        return weight, targets

    def _whole_vector(self, name: str, size: int) -> VectorTarget:
        return self._vector(name, self._empty(self.placement.slots + 1, size))

    def _vector(self, name: str, table: torch.Tensor) -> VectorTarget:
        target = VectorTarget(name, self._read(name, (table.shape[1],)), table)
        self.targets[name] = target
        return target

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if self.source.shape(name) != shape:
            raise CheckpointInvalid(
                f"{name} is {list(self.source.shape(name))}, but config.json makes it {list(shape)}: "
                "config.json belongs to another checkpoint"
            )
        return self.source.tensor(name)

    def _empty(self, *size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=self.placement.dtype, device=self.placement.device)
