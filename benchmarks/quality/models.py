"""Trains the base, its fine-tunes and its adapters, each once: what is in the cache is not trained again."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from benchmarks.quality.data import Batch
from benchmarks.quality.prepare import SEED, Prepared
from benchmarks.quality.scales import Phase, Scale
from benchmarks.quality.training import Full, LowRank, Trained, fit, predict_all, predict_answers, save
from deltazip_deployments.demo.checkpoints import CheckpointCache

SKILLS_SHARE = 0.15
"""Of the sequences that the base learns from; the rest is text."""
BASE = "base"
RECORD = "training.json"


class Trainer:
    """Trains one model after another in the same module, so that what was compiled serves all."""

    def __init__(self, model: LlamaForCausalLM, prepared: Prepared, scale: Scale, cache: CheckpointCache) -> None:
        """``model`` has the random weights that the base starts from."""
        self._model, self._prepared, self._scale, self._cache = model, prepared, scale, cache

    def base(self) -> Path:
        """The base's checkpoint."""
        return self._cache.get(BASE, self._make_base)

    def finetune(self, task: str) -> Path:
        """The checkpoint of a full fine-tune."""
        return self._cache.get(task, partial(self._make_variant, task, self._scale.finetune, adapter=False))

    def adapter(self, task: str) -> Path:
        """The checkpoint of base + LoRA."""
        return self._cache.get(adapter_of(task), partial(self._make_variant, task, self._scale.adapter, adapter=True))

    def _make_base(self, path: Path) -> None:
        phase = self._scale.pretrain
        done = fit(self._model, Full(self._model), self._windows(phase), phase, predict_all)
        self._save(path, done)

    def _make_variant(self, task: str, phase: Phase, path: Path, *, adapter: bool) -> None:
        self._model.load_state_dict(load_file(self.base() / "model.safetensors"))
        torch.manual_seed(SEED)
        what = LowRank(self._model) if adapter else Full(self._model)
        self._save(path, fit(self._model, what, self._examples(task, phase), phase, predict_answers))

    def _save(self, path: Path, done: Trained) -> None:
        save(self._model, self._prepared.tokenizer, path)
        (path / RECORD).write_text(json.dumps(asdict(done)))

    def _windows(self, phase: Phase) -> Iterator[Batch]:
        """Random pieces of the streams: the first sequences of a batch are skills, the others text."""
        device = self._model.device
        streams = [self._prepared.skills().to(device), self._prepared.text(held_out=False).to(device)]
        counts = [round(SKILLS_SHARE * phase.batch), phase.batch - round(SKILLS_SHARE * phase.batch)]
        generator = torch.Generator(device).manual_seed(SEED)
        inside = torch.arange(phase.length + 1, device=device)
        while True:
            pieces = [
                stream[
                    torch.randint(len(stream) - len(inside), (count, 1), device=device, generator=generator) + inside
                ]
                for stream, count in zip(streams, counts, strict=True)
            ]
            tokens = torch.cat(pieces).long()
            yield Batch(tokens, tokens)

    def _examples(self, task: str, phase: Phase) -> Iterator[Batch]:
        """The examples of a task in turn, from the first again after the last."""
        examples = Batch(*(tensor.to(self._model.device) for tensor in self._prepared.examples(task)))
        at = torch.arange(phase.batch, device=self._model.device)
        while True:
            yield Batch(examples.tokens[at], examples.labels[at])
            at = (at + phase.batch) % len(examples.tokens)


def unchanged_rows(base: Path, finetuned: Path) -> dict[str, float]:
    """Of each matrix of the vocabulary, the share of rows that a fine-tune left as they were."""
    before, after = (load_file(path / "model.safetensors") for path in (base, finetuned))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return {name: float((before[name] == after[name]).all(1).float().mean()) for name in names}


def adapter_of(task: str) -> str:
    """The name of a task's adapter in the cache."""
    return f"{task}-lora"


def trained(path: Path) -> dict[str, float]:
    """What the training of a checkpoint did."""
    record: dict[str, float] = json.loads((path / RECORD).read_text())
    return record
