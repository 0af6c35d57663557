"""Examples as tokens: what the base is taught besides text, and what each fine-tune learns."""

import random
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.quality.tasks import TASKS
from deltazip_deployments.demo.corpus import IGNORED
from deltazip_deployments.demo.tasks import Example, Task
from deltazip_deployments.demo.tokenizer import Frame

REPEAT_SHARE = 0.4
REPEAT = "Repeat"


class Batch(NamedTuple):
    """``tokens`` and ``labels`` i64 ``[sequences, tokens]``, padded at the right; labels are those of the answers."""

    tokens: Tensor
    labels: Tensor


def skills(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> np.ndarray:
    """A stream of tokens: tasks under their instructions, and repeating whatever comes without one."""
    rng = random.Random(seed)
    streams = {name: task.examples(seed, held_out=False) for name, task in TASKS.items()}
    taught = [task for task in TASKS.values() if task.instruction]
    frames = {instruction: Frame.of(tokenizer, instruction) for instruction in (None, REPEAT)}
    frames |= {task.instruction: Frame.of(tokenizer, task.instruction) for task in taught}
    texts = []
    for _ in range(count):
        if rng.random() < REPEAT_SHARE:
            question = next(streams[rng.choice(list(TASKS))]).question
            texts.append(frames[rng.choice([None, REPEAT])].prompt(question) + question)
        else:
            task = rng.choice(taught)
            question, answer = next(streams[task.name])
            texts.append(frames[task.instruction].prompt(question) + answer)
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([*text.ids, end], np.uint16) for text in encoded])


def training_examples(tokenizer: PreTrainedTokenizerFast, task: Task, seed: int, count: int, length: int) -> Batch:
    """``count`` examples of a task; longer ones than ``length`` tokens are left out."""
    return encode(tokenizer, list(islice(task.examples(seed, held_out=False), count)), length)


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], length: int) -> Batch:
    """Examples of at most ``length`` tokens, padded to that."""
    frame = Frame.of(tokenizer)
    fast = tokenizer.backend_tokenizer
    prompts = fast.encode_batch_fast([frame.prompt(question) for question, _ in examples], add_special_tokens=False)
    answers = fast.encode_batch_fast([answer for _, answer in examples], add_special_tokens=False)
    tokens = np.full((len(examples), length), tokenizer.pad_token_id, np.int64)
    labels = np.full_like(tokens, IGNORED)
    row = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        given = [*prompt.ids, *answer.ids, tokenizer.eos_token_id]
        if len(given) <= length:
            tokens[row, : len(given)] = given
            labels[row, len(prompt.ids) : len(given)] = given[len(prompt.ids) :]
            row += 1
    return Batch(torch.from_numpy(tokens[:row]), torch.from_numpy(labels[:row]))
