"""Builds layers from a checkpoint: tensors go straight from safetensors to the device, projections are fused."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from deltazip_kernels.fp8 import FP8_MULTIPLE, Fp8Matrix, empty_fp8
from deltazip_ray.errors import CheckpointInvalid, ConfigError
from deltazip_ray.layers.activations import BaseWeight, weight_rows
from deltazip_ray.layers.linear import DeltaLinear
from deltazip_ray.layers.norm import DeltaHeadNorm, DeltaLayerNorm, DeltaRMSNorm, Norm
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.layers.targets import AddedTarget, DeltaTarget, MatrixTarget, VectorTarget
from deltazip_ray.models.decoder_config import NormKind


class WeightSource(Protocol):
    """A source of weights: a checkpoint."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises CheckpointInvalid."""

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on any device. Raises CheckpointInvalid."""


@dataclass(frozen=True)
class Placement:
    """The device and dtype of the weights, and the room for versions."""

    dtype: torch.dtype
    device: torch.device
    slots: int
    max_added: int
    """Rows that a version may add to the vocabulary."""
    ops: LayerOps = field(default_factory=LayerOps)
    fp8: bool = False
    """Whether the linears of the blocks are kept in fp8; everything else, also embedding and head, is in ``dtype``."""


@dataclass
class WeightReader:
    """Reads the base's weights, and collects the targets that versions are loaded into, by checkpoint name."""

    source: WeightSource
    placement: Placement
    targets: dict[str, DeltaTarget] = field(default_factory=dict)

    def matrix(self, name: str, shape: tuple[int, int]) -> MatrixTarget:
        """A single matrix, in ``dtype``. Raises CheckpointInvalid, like every method here."""
        weight = self._empty(*shape)
        (target,) = self._fused(weight, [name], [shape[0]])
        return target

    def linear(self, names: Sequence[str], outs: Sequence[int], inputs: int, *, bias: bool) -> DeltaLinear:
        """Modules ``names`` with ``outs`` outputs each, fused into one weight ``[sum(outs), inputs]``.

        Raises ConfigError for shapes that fp8 does not support.
        """
        empty = self._empty_fp8 if self.placement.fp8 else self._empty
        weight: BaseWeight = empty(sum(outs), inputs)
        targets = self._fused(weight, [f"{name}.weight" for name in names], outs)
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
        """The norms of the heads of q and k, which have ``size`` columns."""
        q, k = (self._whole_vector(f"{name}.weight", size) for name in names)
        return DeltaHeadNorm(q, k, eps)

    def added(self, name: str, hidden: int) -> AddedTarget:
        """Room for the rows that versions add to the matrix ``name``."""
        place = self.placement
        # Zeros, as rows that a version does not have are read too, and then masked.
        table = torch.zeros(place.slots + 1, place.max_added, hidden, dtype=place.dtype, device=place.device)
        target = AddedTarget(f"{name}.added", table)
        self.targets[target.name] = target
        return target

    def _fused(self, weight: BaseWeight, names: Sequence[str], outs: Sequence[int]) -> list[MatrixTarget]:
        """Fill ``weight`` with matrices of ``outs`` rows, stacked."""
        inputs = weight.shape[1]
        stack = self.placement.ops.stack([(size, inputs) for size in outs], self.placement.slots)
        targets = []
        for part, (name, size) in enumerate(zip(names, outs, strict=True)):
            rows = weight_rows(weight, stack.starts[part], stack.starts[part + 1])
            values = self._read(name, (size, inputs))
            if isinstance(rows, Fp8Matrix):
                rows.fill(values)
            else:
                rows.copy_(values)
            targets.append(MatrixTarget(name, rows, stack, part))
            self.targets[name] = targets[-1]
        return targets

    def _whole_vector(self, name: str, size: int) -> VectorTarget:
        return self._vector(name, self._empty(self.placement.slots + 1, size))

    def _vector(self, name: str, table: torch.Tensor) -> VectorTarget:
        target = VectorTarget(name, self._read(name, (table.shape[1],)), table)
        self.targets[name] = target
        return target

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if self.source.shape(name) != shape:
            raise CheckpointInvalid(
                f"{name} has shape {list(self.source.shape(name))}, but {list(shape)} by config.json, which must "
                "belong to another checkpoint"
            )
        return self.source.tensor(name)

    def _empty_fp8(self, rows: int, columns: int) -> Fp8Matrix:
        if rows % FP8_MULTIPLE or columns % FP8_MULTIPLE:
            raise ConfigError(
                f"engine.base_dtype fp8 needs linears with multiples of {FP8_MULTIPLE}, but this base has one of "
                f"{[rows, columns]}: remove the setting"
            )
        return empty_fp8(rows, columns, self.placement.device)

    def _empty(self, *size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=self.placement.dtype, device=self.placement.device)
