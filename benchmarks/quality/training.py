"""Training on one device: float32 weights, bf16 matrix products, decoder layers compiled one for all."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality.data import Batch
from benchmarks.quality.scales import Phase, Scale
from benchmarks.quality.text import BOS, EOS, PAD, SPECIAL
from deltazip_deployments.demo.corpus import IGNORED

DECAY = 0.6
RANK, ALPHA = 16, 32


class Trainable(Protocol):
    """What of a model is trained, and how it becomes the model's weights."""

    def parameters(self) -> list[Tensor]:
        """What the optimizer steps."""

    def load(self) -> None:
        """Write the model's weights that follow from the parameters."""

    def collect(self) -> None:
        """Turn the gradients of the model's weights into those of the parameters."""


class Full:
    """Every weight."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = list(model.parameters())

    def parameters(self) -> list[Tensor]:
        return list(self._weights)

    def load(self) -> None:
        pass

    def collect(self) -> None:
        pass


class LowRank:
    """LoRA on every linear of the blocks: weight = start + scale · B · A; A is ``[rank, in]``, B ``[out, rank]``."""

    scale = ALPHA / RANK

    def __init__(self, model: nn.Module) -> None:
        self._weights = block_matrices(model)
        self._start = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._down = {
            n: torch.randn(RANK, w.shape[1], device=w.device) / w.shape[1] ** 0.5 for n, w in self._start.items()
        }
        self._up = {n: torch.zeros(w.shape[0], RANK, device=w.device) for n, w in self._start.items()}

    def parameters(self) -> list[Tensor]:
        return [*self._down.values(), *self._up.values()]

    def load(self) -> None:
        for name, weight in self._weights.items():
            weight.data.copy_(torch.addmm(self._start[name], self._up[name], self._down[name], alpha=self.scale))

    def collect(self) -> None:
        for name, weight in self._weights.items():
            gradient = _taken(weight)
            self._down[name].grad = self.scale * self._up[name].T @ gradient
            self._up[name].grad = self.scale * gradient @ self._down[name].T


class Scales:
    """One scale for each matrix of signs: weight = base + e^s · signs, where s starts at 0."""

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor], signs: Mapping[str, Tensor]) -> None:
        self._weights = {name: weight for name, weight in block_matrices(model).items() if name in signs}
        self._base, self._signs = base, signs
        self.logs = {name: torch.zeros((), device=weight.device) for name, weight in self._weights.items()}

    def parameters(self) -> list[Tensor]:
        return list(self.logs.values())

    def load(self) -> None:
        for name, weight in self._weights.items():
            weight.data.copy_(self._base[name] + self.logs[name].exp() * self._signs[name])

    def collect(self) -> None:
        for name, weight in self._weights.items():
            self.logs[name].grad = (_taken(weight) * self._signs[name]).sum() * self.logs[name].exp()


def block_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all linears inside the decoder blocks, by name."""
    return {name: weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2}


@dataclass(frozen=True)
class Trained:
    """What a training did."""

    steps: int
    seconds: float
    loss: float
    """Mean of the last twentieth."""


def fit(
    model: LlamaForCausalLM,
    what: Trainable,
    batches: Iterator[Batch],
    phase: Phase,
    loss: Callable[[LlamaForCausalLM, Batch], Tensor],
) -> Trained:
    """Train ``what`` in place."""
    parameters = what.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=phase.peak_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses = []
    began = time.monotonic()
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = phase.peak_lr * _rate(step, phase)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            found = loss(model, next(batches))
        found.backward()
        what.collect()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        model.zero_grad()
        what.load()
        losses.append(found.detach())
    recent = torch.stack(losses[-max(1, phase.steps // 20) :])
    return Trained(phase.steps, time.monotonic() - began, float(recent.mean()))


def predict_all(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross entropy of every token but the first."""
    hidden = model.model(input_ids=batch.tokens[:, :-1], use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), batch.tokens[:, 1:].flatten())


def predict_answers(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross entropy of the answers' tokens; the head computes only those."""
    hidden = model.model(input_ids=batch.tokens[:, :-1], use_cache=False).last_hidden_state
    targets = batch.labels[:, 1:]
    learnt = targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[learnt]).float(), targets[learnt])


def new_model(scale: Scale, device: str, seed: int) -> LlamaForCausalLM:
    """A base with random weights."""
    config = LlamaConfig(
        vocab_size=scale.vocab,
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        max_position_embeddings=2 * scale.pretrain.length,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
        architectures=["LlamaForCausalLM"],
        dtype=torch.float32,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return LlamaForCausalLM(config)


def compile_layers(model: LlamaForCausalLM, shapes: list[tuple[int, int]]) -> None:
    """Compile the decoder layers for batches of these ``(sequences, tokens)``: one compilation a shape serves all."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    for shape in shapes:
        tokens = torch.randint(model.config.vocab_size, shape, device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            predict_all(model, Batch(tokens, tokens)).backward()
    model.zero_grad()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a checkpoint in float16 to the empty folder ``path``."""
    config = type(model.config).from_dict(model.config.to_dict() | {"dtype": "float16"})
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    weights = {name: weight.half().cpu().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _rate(step: int, phase: Phase) -> float:
    """The learning rate of a step in units of the peak."""
    return min(1.0, (step + 1) / phase.warmup, (phase.steps - step) / (DECAY * phase.steps))


def _taken(weight: Tensor) -> Tensor:
    """The gradient of a weight."""
    if weight.grad is None:
        raise ValueError("a weight of the blocks has no gradient")
    return weight.grad
