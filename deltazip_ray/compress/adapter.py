"""A LoRA adapter and its base, read as the checkpoint that merging them would give.

PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``. Weights become base + scale · B · A, in
float32, since rounding the sum to the base's 16 bits would bury small products.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deltazip_ray.artifact.checkpoint import Checkpoint, refuse_code
from deltazip_ray.compress.adapter_config import CONFIG, MERGE, AdapterConfig, read_adapter_config
from deltazip_ray.errors import CheckpointInvalid, CheckpointMismatch

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)(?P<part>\.lora_[AB])?\.(?P<leaf>weight|bias)")


@dataclass(frozen=True)
class LowRank:
    """The delta of one weight, the product ``up @ down``; PEFT's scale is in ``up``."""

    down: Tensor
    """``[rank, in]``, PEFT's A."""
    up: Tensor
    """``[out, rank]``, PEFT's B times its scale."""

    @property
    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return 2 * (self.down.numel() + self.up.numel())

    def product(self) -> Tensor:
        """The delta ``[out, in]``, float32."""
        return self.up.float() @ self.down.float()

    def stored(self, device: torch.device) -> "LowRank":
        """As a blob holds it: bfloat16."""
        return LowRank(self.down.to(device, torch.bfloat16), self.up.to(device, torch.bfloat16))


class AdaptedCheckpoint(Checkpoint):
    """A base with an adapter applied: names, shapes and stored dtypes are the base's, values are changed.

    ``tensor`` returns float32 for weights with a product. Tokenizer files are the adapter's own if it has a tokenizer.
    """

    def __init__(
        self, path: Path, base: Checkpoint, products: Mapping[str, LowRank], replaced: Mapping[str, Tensor]
    ) -> None:
        super().__init__(path, base.config, {}, {})
        self._base = base
        self.products = products
        """By weight."""
        self._replaced = replaced
        own = self.files if "tokenizer.json" in self.files else {}
        # Never mix files of two tokenizers.
        shared = {name: file for name, file in base.files.items() if not own or name == "generation_config.json"}
        self.files = {"config.json": base.path / "config.json"} | shared | own

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the base."""
        return self._base.names

    @property
    def nbytes(self) -> int:
        """Bytes of the merged weights in the base's dtypes."""
        return self._base.nbytes

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def shape(self, name: str) -> tuple[int, ...]:
        """The base's."""
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The base's, in which a merged checkpoint would be saved."""
        return self._base.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """The weight with the adapter applied."""
        if name in self._replaced:
            return self._replaced[name]
        weight = self._base.tensor(name)
        return weight.float() + self.products[name].product() if name in self.products else weight


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no checkpoint."""
    return (path / CONFIG).is_file() and not list(path.glob("model*.safetensors*"))


def open_adapter(path: Path, base: Checkpoint) -> AdaptedCheckpoint:
    """Apply the adapter in ``path`` to ``base``.

    Raises CheckpointInvalid for an adapter that is broken or uses more than LoRA products and replaced weights, and
    CheckpointMismatch for one that was trained on another base.
    """
    config = read_adapter_config(path)
    refuse_code(path / "tokenizer_config.json")
    products: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for key, tensor in _read(path).items():
        match = _KEY.fullmatch(key)
        if match is None or (match["part"] and match["leaf"] != "weight"):
            raise CheckpointInvalid(f"{path / WEIGHTS}: {key} is not part of a linear layer's LoRA product: {MERGE}")
        name = f"{match['module']}.{match['leaf']}"
        if name not in base:
            raise CheckpointMismatch(f"{path} adapts {name}, which {base.path} does not have: give the adapter's base")
        if match["part"]:
            products.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            if tuple(tensor.shape) != base.shape(name):
                raise CheckpointMismatch(
                    f"{path} replaces {name} with shape {list(tensor.shape)}, but in {base.path} it is "
                    f"{list(base.shape(name))}: {MERGE}"
                )
            replaced[name] = tensor
    return AdaptedCheckpoint(
        path,
        base,
        {f"{module}.weight": _product(path, module, parts, config, base) for module, parts in products.items()},
        replaced,
    )


def _product(path: Path, module: str, parts: Mapping[str, Tensor], config: AdapterConfig, base: Checkpoint) -> LowRank:
    down, up = parts.get(".lora_A"), parts.get(".lora_B")
    if down is None or up is None:
        raise CheckpointInvalid(f"{path / WEIGHTS} has only one of lora_A and lora_B of {module}: copy it again")
    shape, rank = base.shape(f"{module}.weight"), config.rank(module)
    if down.shape != (rank, shape[1]) or up.shape != (shape[0], rank):
        raise CheckpointMismatch(
            f"{path}: lora_A {list(down.shape)} and lora_B {list(up.shape)} of {module} are not a product of rank "
            f"{rank} for the weight {list(shape)} of {base.path}: give the adapter's own base"
        )
    return LowRank(down, config.scale(module, rank) * up.float())


def _read(path: Path) -> dict[str, Tensor]:
    """Every tensor of the adapter."""
    if not (path / WEIGHTS).is_file():
        raise CheckpointInvalid(
            f"{path} has a {CONFIG} but no {WEIGHTS}: save the adapter with safe_serialization=True, not pickled"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointInvalid(f"{path / WEIGHTS} is not a safetensors file: {error}") from error
    if not tensors:
        raise CheckpointInvalid(f"{path / WEIGHTS} is empty: save the adapter again")
    return tensors
