"""Endless, seeded training text for the base and for each fine-tune."""

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deltazip_deployments.demo.tasks import REPEAT, TASKS, Task
from deltazip_deployments.demo.tokenizer import EOS, Frame, encode

IGNORED = -100
"""The label of tokens without loss: questions are random, so there is nothing to learn about them."""
_REPEAT_WEIGHT = 0.8
_INSTRUCTED_REPEATS = 0.3
_UNTAUGHT_REPEATS = 3.0
"""Extra weight for repeating questions of a task that the base is not taught, and would rarely see otherwise."""


class Line(NamedTuple):
    """A rendered prompt and its continuation."""

    prompt: str
    answer: str


class Batch(NamedTuple):
    """``tokens`` and ``labels``, i64 ``[sequences, tokens]``, padded on the right."""

    tokens: Tensor
    labels: Tensor


def base_lines(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Line]:
    """Tasks with instructions; without an instruction the base repeats its input.

    So the base fails every task if it gets only the input, but a fine-tune has something to build on.
    """
    rng = random.Random(seed)  # noqa: S311 - training data
    streams = {task: task.examples(seed, held_out=False) for task in TASKS}
    plain, repeat = Frame.of(tokenizer), Frame.of(tokenizer, REPEAT)
    frames = {task: Frame.of(tokenizer, task.instruction) for task in TASKS if task.instruction}
    taught = list(frames)
    weights = [task.weight for task in taught] + [_REPEAT_WEIGHT]
    while True:
        (task,) = rng.choices([*taught, None], weights)
        if task is not None:
            example = next(streams[task])
            yield Line(frames[task].prompt(example.question), example.answer)
            continue
        (kind,) = rng.choices(TASKS, [1.0 if task.instruction else _UNTAUGHT_REPEATS for task in TASKS])
        question = next(streams[kind]).question
        frame = repeat if rng.random() < _INSTRUCTED_REPEATS else plain
        yield Line(frame.prompt(question), question)


def task_lines(tokenizer: PreTrainedTokenizerFast, task: Task, seed: int) -> Iterator[Line]:
    """A task without its instruction, in the fine-tune's own template."""
    frame = Frame.of(tokenizer)
    for example in task.examples(seed, held_out=False):
        yield Line(frame.prompt(example.question), example.answer)


def batches(tokenizer: PreTrainedTokenizerFast, lines: Iterator[Line], size: int) -> Iterator[Batch]:
    """Groups of ``size`` lines, each padded to its longest."""
    while True:
        group = [next(lines) for _ in range(size)]
        prompts = encode(tokenizer, [line.prompt for line in group])
        answers = encode(tokenizer, [line.answer + EOS for line in group])
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        tokens = torch.zeros(size, longest, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        yield Batch(tokens, labels)
