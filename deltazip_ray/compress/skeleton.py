"""A checkpoint's architecture without its weights, from which single modules are built."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.compress.families import FAMILIES, Family
from deltazip_ray.errors import CheckpointInvalid

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Skeleton:
    """The transformers model of a checkpoint on the meta device: names, shapes and modules without memory.

    Raises CheckpointInvalid for an architecture that is not in FAMILIES, or a config that transformers rejects.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.family = _family(checkpoint)
        auto: Any = AutoModelForCausalLM
        try:
            config = AutoConfig.for_model(**checkpoint.config)
            config._attn_implementation = self.family.attention
            with torch.device("meta"):
                model = auto.from_config(config)
        except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
            raise CheckpointInvalid(f"{checkpoint.path}/config.json is not usable: {error}") from error
        self.config: PreTrainedConfig = config
        self._model: Any = model.eval().requires_grad_(False)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def embedding(self) -> str:
        """Name of the embedding's weight."""
        return f"{self.family.embedding}.weight"

    @property
    def head(self) -> str:
        """Name of the weight that makes logits: the embedding's when they are tied."""
        return self.embedding if self.tied else f"{self.family.head}.weight"

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the final norm's weights."""
        return tuple(f"{self.family.norm}.{name}" for name in self._model.get_submodule(self.family.norm).state_dict())

    @property
    def embedding_scale(self) -> float:
        """The factor on embeddings before the first block."""
        return float(self.config.hidden_size**0.5) if self.family.scaled_embedding else 1.0

    @property
    def logits_softcap(self) -> float | None:
        """The soft cap on the logits, if any."""
        return getattr(self.config, "final_logit_softcapping", None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight as checkpoints name it; the head is absent when it is tied."""
        found = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        head = found.pop(self._output_weight, None)
        if head is not None and not self.tied:
            found[f"{self.family.head}.weight"] = head
        return found

    @property
    def _output_weight(self) -> str:
        """The name of the head's weight in transformers, which differs between releases and from checkpoints."""
        head = self._model.get_output_embeddings()
        return next(f"{name}.weight" for name, module in self._model.named_modules() if module is head)

    def block_name(self, index: int) -> str:
        """Prefix of block ``index`` in tensor names, without the dot."""
        return f"{self.family.layers}.{index}"

    def block_weights(self, index: int) -> list[str]:
        """Names of all weights of block ``index``, relative to the block."""
        return list(self._model.get_submodule(self.block_name(index)).state_dict())

    def part(self, name: str, weights: Mapping[str, Tensor]) -> nn.Module:
        """The submodule ``name`` with ``weights``, which are not copied."""
        module: nn.Module = copy.deepcopy(self._model.get_submodule(name))
        module.load_state_dict(dict(weights), strict=True, assign=True)
        return module

    def final_norm(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The norm before the head; ``weights`` have the names of the checkpoint."""
        start = len(self.family.norm) + 1
        return self.part(self.family.norm, {name[start:]: weights[name] for name in self.norms})

    def embed(self, rows: Tensor) -> Tensor:
        """Scale rows of the embedding for the first block."""
        # The factor is rounded to the dtype of the rows, as in transformers.
        return rows * rows.new_tensor(self.embedding_scale) if self.family.scaled_embedding else rows

    def attention_mask(self, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The mask to add to the attention scores of ``tokens`` positions; right padding needs no other.

        None where the attention implementation is causal by itself.
        """
        if self.family.attention == "sdpa":
            return None
        hidden = torch.full((1, 1, tokens, tokens), torch.finfo(dtype).min, dtype=dtype, device=device)
        return hidden.triu(1)

    def rotary(self, device: torch.device) -> nn.Module:
        """The module that computes cosines and sines of positions; its buffers follow from the config."""
        kind: Any = type(self._model.get_submodule(self.family.rotary))
        module: nn.Module = kind(config=self.config)
        return module.to(device)

    def whole(self, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
        """The complete model with ``weights``, which are not copied."""
        model: Any = copy.deepcopy(self._model)
        named = dict(weights)
        if not self.tied:
            named[self._output_weight] = named.pop(f"{self.family.head}.weight")
        model.load_state_dict(named, strict=False, assign=True)
        model.tie_weights()
        embedding = model.get_input_embeddings()
        if hasattr(embedding, "embed_scale"):
            embedding.embed_scale = torch.tensor(self.embedding_scale, device=device)
        parent, _, leaf = self.family.rotary.rpartition(".")
        setattr(model.get_submodule(parent), leaf, self.rotary(device))
        module: nn.Module = model
        return module


def load_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """The tensor ``name`` on the host; it may be mapped from the file.

    Raises CheckpointInvalid when it is not finite.
    """
    return check_tensor(checkpoint, name, checkpoint.tensor(name), torch.device("cpu"))


def check_tensor(checkpoint: Checkpoint, name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, the checkpoint's ``name``, on ``device``. Raises CheckpointInvalid when it is not finite."""
    if tensor.dtype not in WEIGHT_DTYPES:
        raise CheckpointInvalid(
            f"{checkpoint.path}: {name} is {tensor.dtype}: save the checkpoint in float32, bfloat16 or float16"
        )
    placed = tensor.to(device)
    # aminmax propagates NaN and needs no temporary of the tensor's size.
    if not torch.stack(placed.aminmax()).isfinite().all():
        raise CheckpointInvalid(
            f"{checkpoint.path}: {name} holds NaN or Inf: save the checkpoint of an earlier training step"
        )
    return placed


def load_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """Several of :func:`load_tensor`."""
    return {name: load_tensor(checkpoint, name) for name in names}


def _family(checkpoint: Checkpoint) -> Family:
    architectures = checkpoint.config.get("architectures") or []
    for architecture in architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise CheckpointInvalid(
        f"{checkpoint.path} is of architecture {', '.join(map(str, architectures)) or 'unknown'}; "
        f"supported are {', '.join(FAMILIES)}"
    )
