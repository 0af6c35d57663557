"""Random deltas in every codec, and what they must decode to, written down without the packed layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltazip_kernels import CODECS, GROUP, LOW_RANK, RAW, PackedDelta, pack


@dataclass(frozen=True)
class Coded:
    """Codes ``[N, K]``, scales ``[N, groups]`` (bf16 values), for sparse codecs the mask of kept columns ``[N, K]``."""

    codec: str
    codes: Tensor
    scales: Tensor
    kept: Tensor | None

    def packed(self) -> dict[str, Tensor]:
        return pack(self.codec, self.codes, self.scales, self.kept)

    def delta(self) -> PackedDelta:
        return PackedDelta(self.codec, (self.codes.shape[0], self.codes.shape[1]), self.packed())

    def dense(self) -> Tensor:
        """The delta ``[N, K]`` in float64, straight from the codec's definition."""
        scales = self.scales.double().repeat_interleave(GROUP, dim=1)[:, : self.codes.shape[1]]
        weights = (self.codes.double() - CODECS[self.codec].zero) * scales
        return weights if self.kept is None else weights * self.kept


def random_coded(codec: str, shape: tuple[int, int], seed: int = 0) -> Coded:
    """Random codes of ``codec``; a sparse one keeps two random columns of each whole quad."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    kind = CODECS[codec]
    codes = torch.randint(0, 1 << kind.bits, shape, generator=generator, dtype=torch.uint8)
    scales = (torch.rand((rows, -(-columns // GROUP)), generator=generator) * 0.02 + 0.001).bfloat16()
    kept = None
    if kind.sparse:
        quads = -(-columns // 4)
        order = torch.rand((rows, quads, 4), generator=generator).argsort(-1)
        kept = (order < 2).flatten(1)[:, :columns]
    return Coded(codec, codes, scales, kept)


def random_raw(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PackedDelta:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    return PackedDelta(RAW, shape, {"values": values.to(dtype)})


def random_low_rank(
    shape: tuple[int, int], rank: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> PackedDelta:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn((rank, shape[1]), generator=generator) * 0.05
    up = torch.randn((shape[0], rank), generator=generator) * 0.05
    return PackedDelta(LOW_RANK, shape, {"down": down.to(dtype), "up": up.to(dtype)})


def on_device(delta: PackedDelta, device: torch.device) -> PackedDelta:
    return PackedDelta(delta.codec, delta.shape, {name: part.to(device) for name, part in delta.tensors.items()})
