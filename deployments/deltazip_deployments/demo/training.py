"""Real training on the CPU: a base from random weights, and full-parameter fine-tunes of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltazip_deployments.demo.corpus import IGNORED, Batch, base_lines, batches, task_lines
from deltazip_deployments.demo.recipe import Phase, Recipe
from deltazip_deployments.demo.tasks import Task
from deltazip_deployments.demo.tokenizer import adapt, make_tokenizer

MAX_GRADIENT_NORM = 1.0
MAX_POSITIONS = 256

Advance = Callable[[], None]
"""Called after each step."""


def train_base(recipe: Recipe, path: Path, advance: Advance) -> None:
    """Train a base from random weights; write its checkpoint, in float16, to the empty folder ``path``."""
    tokenizer = make_tokenizer()
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(_config(recipe, tokenizer))
    lines = base_lines(tokenizer, recipe.seed)
    _train(model, batches(tokenizer, lines, recipe.pretrain.batch), recipe.pretrain, recipe.threads, advance)
    _save(model, tokenizer, path)


def finetune(recipe: Recipe, task: Task, base: Path, path: Path, advance: Advance) -> None:
    """Train all weights of a copy of ``base`` on ``task``; write the checkpoint to the empty folder ``path``."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapt(tokenizer, task)
    torch.manual_seed(recipe.seed)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lines = task_lines(tokenizer, task, recipe.seed)
    _train(model, batches(tokenizer, lines, recipe.finetune.batch), recipe.finetune, recipe.threads, advance)
    _save(model, tokenizer, path)


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(model: LlamaForCausalLM, data: Iterator[Batch], phase: Phase, threads: int, advance: Advance) -> None:
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.peak_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, phase))
    with _threads(threads):
        for _ in range(phase.steps):
            _loss(model, next(data)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads during the block, but not more than there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rate(step: int, phase: Phase) -> float:
    """The learning rate of a step (from 0) relative to the peak."""
    rising = (step + 1) / max(1.0, phase.warmup * phase.steps)
    falling = (phase.steps - step) / (phase.decay * phase.steps)
    return min(1.0, rising, falling)


def _loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross entropy of the answers' tokens; the head is applied to those only."""
    hidden = model.model(input_ids=batch.tokens).last_hidden_state[:, :-1]
    targets = batch.labels[:, 1:]
    learnt = targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[learnt]), targets[learnt])


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    model.half().save_pretrained(path)
    tokenizer.save_pretrained(path)
