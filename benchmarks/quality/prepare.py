"""Everything that training and measuring read, made once: tokenizer, streams of tokens, examples, calibration chats."""

import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.quality.data import Batch, encode, skills, training_examples
from benchmarks.quality.scales import Scale
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.text import read_corpus, to_stream, train_tokenizer
from deltazip_deployments.demo.tasks import Example

SEED = 0
SHARDS = 8
"""Pieces in which the skills are made, each with a seed of its own."""


class Prepared:
    """The files of a prepared folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer_folder = folder / "tokenizer"

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(self.tokenizer_folder)
        return tokenizer

    def text(self, *, held_out: bool) -> torch.Tensor:
        """A stream of tokens, i32."""
        return _stream([self.folder / ("held-out.npy" if held_out else "text.npy")])

    def skills(self) -> torch.Tensor:
        """A stream of tokens, i32."""
        return _stream(self.folder / f"skills-{shard}.npy" for shard in range(SHARDS))

    def chats(self, task: str) -> Path:
        """The calibration chats of a task."""
        return self.folder / f"{task}.jsonl"

    def examples(self, task: str) -> Batch:
        """The training examples of a task."""
        return Batch(*torch.load(self.folder / f"{task}.pt"))

    def held_out(self, task: str, scale: Scale) -> tuple[list[Example], Batch]:
        """Questions that no training has seen, and the same as tokens."""
        questions = TASKS[task].held_out(SEED + 1, scale.questions)
        answers = encode(self.tokenizer, questions, scale.finetune.length)
        if len(answers.tokens) != len(questions):
            raise ValueError(f"a question of {task} is longer than {scale.finetune.length} tokens")
        return list(questions), answers

    def windows(self, scale: Scale) -> torch.Tensor:
        """Pieces of held-out text, i64 ``[pieces, tokens]``, evenly spaced."""
        stream = self.text(held_out=True)
        starts = torch.linspace(0, len(stream) - scale.pretrain.length, scale.windows).long()
        return stream[starts[:, None] + torch.arange(scale.pretrain.length)].long()


def prepare(folder: Path, scale: Scale, workers: int) -> None:
    """Fill ``folder``, with so many processes."""
    corpus = read_corpus(scale.corpus_bytes)
    tokenizer = train_tokenizer(corpus.training, scale.vocab, scale.tokenizer_bytes)
    if len(tokenizer) != scale.vocab:
        raise ValueError(f"the text gave {len(tokenizer)} tokens, not {scale.vocab}: read more of it")
    tokenizer.save_pretrained(folder / "tokenizer")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_make_skills, folder, scale, shard) for shard in range(SHARDS)]
        jobs += [pool.submit(_make_task, folder, scale, name) for name in TASKS]
        np.save(folder / "held-out.npy", to_stream(tokenizer, corpus.held_out))
        np.save(folder / "text.npy", to_stream(tokenizer, corpus.training))
        for job in jobs:
            job.result()


def _make_skills(folder: Path, scale: Scale, shard: int) -> None:
    tokens = skills(Prepared(folder).tokenizer, scale.skills // SHARDS, SEED + shard)
    np.save(folder / f"skills-{shard}.npy", tokens)


def _make_task(folder: Path, scale: Scale, name: str) -> None:
    phase = scale.finetune
    count = phase.steps * phase.batch
    batch = training_examples(Prepared(folder).tokenizer, TASKS[name], SEED, count, phase.length)
    torch.save(tuple(batch), folder / f"{name}.pt")
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in TASKS[name].training(SEED, scale.calibration)
    ]
    Prepared(folder).chats(name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _stream(paths: Iterable[Path]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.load(path) for path in paths]).astype(np.int32))
