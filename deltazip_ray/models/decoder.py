"""The decoder: a forward pass over a flat batch whose rows belong to any mix of versions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deltazip_ray.layers.attention.backend import AttentionBackend
from deltazip_ray.layers.embedding import DeltaEmbedding, DeltaHead
from deltazip_ray.layers.rope import Rotary
from deltazip_ray.layers.rows import Rows
from deltazip_ray.models.block import LlamaBlock, StepContext
from deltazip_ray.models.decoder_config import DecoderConfig
from deltazip_ray.models.neox_block import NeoXBlock
from deltazip_ray.models.weights import WeightReader


def go_on(layer: int | None) -> None:
    """A ``before_layer`` for versions that are completely loaded."""


@dataclass(frozen=True)
class StepInputs:
    """One step, on the device."""

    tokens: torch.Tensor
    """``[rows]`` int64."""
    positions: torch.Tensor
    """``[rows]`` int64: the position of each token in its sequence."""
    rows: Rows
    plan: Any
    """The attention backend's plan for these rows."""
    last: torch.Tensor | None
    """``[sampled]`` int64: rows whose logits are needed, in order; None: all."""
    last_rows: Rows
    """The versions of the rows in ``last``."""
    before_layer: Callable[[int | None], None] = go_on
    """Called with the index of the layer that runs next; first with None, for weights outside the layers."""


_BLOCKS: dict[str, type[LlamaBlock] | type[NeoXBlock]] = {"llama": LlamaBlock, "gpt_neox": NeoXBlock}


class Decoder:
    """A whole model. Building it gives ``weights.targets`` a target for every weight that a version may change."""

    def __init__(
        self, config: DecoderConfig, weights: WeightReader, backend: AttentionBackend[Any], max_positions: int
    ) -> None:
        place, names = weights.placement, config.names
        rotary = Rotary(config.inv_freq, config.rope_scale, max_positions, place.device)
        shape = (config.vocab_size, config.hidden_size)
        tokens = weights.matrix(f"{names.embedding}.weight", shape)
        added = weights.added(tokens.name, config.hidden_size)
        self.embedding = DeltaEmbedding(tokens, added)
        # Rounded to the dtype of the embeddings, as in training.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=place.dtype))
        block = _BLOCKS[config.block]
        self.blocks = [block(i, config, weights, rotary, backend) for i in range(config.layers)]
        self.norm = weights.norm(names.norm, config.hidden_size, config.norm, config.norm_eps)
        if not config.tied:
            tokens = weights.matrix(f"{names.head}.weight", shape)
            added = weights.added(tokens.name, config.hidden_size)
        self.head = DeltaHead(tokens, added, place.ops, config.logits_softcap)

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Logits ``[sampled, vocab + added]`` of the rows ``inputs.last``; writes the KV cache."""
        return self.logits(self.states(inputs), inputs.last, inputs.last_rows)

    def states(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream ``[rows, hidden]`` and the last block's update of it; writes the KV cache."""
        step = StepContext(inputs.rows, inputs.positions, inputs.plan)
        inputs.before_layer(None)
        stream = self.embedding(inputs.tokens, inputs.rows)
        if self.embedding_scale != 1:
            stream *= self.embedding_scale
        inputs.before_layer(0)
        update = self.blocks[0](stream, None, step)
        for index, block in enumerate(self.blocks[1:], 1):
            inputs.before_layer(index)
            update = block(stream, update, step)
        return stream, update

    def logits(self, states: tuple[torch.Tensor, torch.Tensor], which: torch.Tensor | None, rows: Rows) -> torch.Tensor:
        """Logits of the rows ``which``, with versions ``rows``; None: of all states, which are then overwritten."""
        stream, update = states if which is None else (states[0][which], states[1][which])
        return self.head(self.norm(stream, rows, update), rows)
