"""``python -m benchmarks.kv_quality --models FOLDER --json FILE``: what a KV cache in fp8 costs, on trained fine-tunes.

FOLDER holds fine-tunes as the demo trains them (``~/.cache/deltazip/demo/<key>``). Each runs through the engine on the
CPU: prompts, then the right answers token by token, so that every one reads the cache. ``exact_match``: answers whose
tokens are all the most probable ones. ``kl``: mean divergence of the next token from the engine in float32.
"""

import argparse
import json
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deltazip_deployments.demo.tasks import TASKS, Task
from deltazip_deployments.demo.tokenizer import Frame, encode
from deltazip_kernels.bench.__main__ import commit
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.core import EngineCore, build_core
from deltazip_ray.scheduler.batch import Batch, Chunk
from deltazip_ray.scheduler.request import GenerateRequest
from deltazip_ray.scheduler.sequence import SequenceState

KINDS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32, fp8 cache": {"dtype": "float32", "kv_dtype": "fp8"},
    "bfloat16, fp8 cache": {"dtype": "bfloat16", "kv_dtype": "fp8"},
}
SETTINGS = {"slots": 1, "slot_bytes": 1 << 20, "kv_blocks": 4096, "max_model_len": 256, "max_added_tokens": 0}
BLOCKS = 16


@torch.inference_mode()
def log_probabilities(core: EngineCore, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Tensor:
    """``[answer tokens, vocab]`` where each token of each answer is predicted; steps mix all."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    found: list[list[Tensor]] = [[] for _ in texts]
    states = [SequenceState(GenerateRequest(str(i), None, tuple(text)), -1) for i, text in enumerate(texts)]
    tables = [array("i", range(i * BLOCKS, (i + 1) * BLOCKS)) for i in range(len(texts))]
    for token in range(max(map(len, answers))):
        live = [i for i, answer in enumerate(answers) if token < len(answer)]
        chunks = []
        for i in live:
            stop = len(prompts[i]) + token
            start = stop - 1 if token else 0
            chunks.append(Chunk(states[i], tuple(texts[i][start:stop]), start, tables[i], samples=True))
        logits = core.runner.decoder(core.runner.prepare(Batch(tuple(chunks)))).float().log_softmax(-1)
        for i, row in zip(live, logits, strict=True):
            found[i].append(row)
    return torch.stack([row for rows in found for row in rows])


def measure(checkpoint: Path, task: Task, questions: int) -> dict[str, Any]:
    """Exact match and divergence of each kind."""
    pairs = {example.question: example.answer for example in task.held_out(0, questions)}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    frame = Frame.of(tokenizer)
    prompts = encode(tokenizer, [frame.prompt(question) for question in pairs])
    whole = encode(tokenizer, [frame.prompt(question) + answer for question, answer in pairs.items()])
    answers = [text[len(prompt) :] for prompt, text in zip(prompts, whole, strict=True)]
    right = torch.tensor([token for answer in answers for token in answer])
    rows: dict[str, Any] = {}
    exact = None
    for name, kind in KINDS.items():
        got = log_probabilities(build_core(EngineConfig(**SETTINGS, **kind), checkpoint), prompts, answers)
        exact = got if exact is None else exact
        hits = (got.argmax(-1) == right).split([len(answer) for answer in answers])
        kl = (exact.exp() * (exact - got)).sum(-1).mean()
        rows[name] = {"exact_match": sum(bool(hit.all()) for hit in hits) / len(hits), "kl": float(kl)}
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, Any] = {"commit": commit(), "questions": options.questions, "tasks": {}}
    for task in TASKS:
        results["tasks"][task.name] = measure(options.models / task.name, task, options.questions)
        sys.stdout.write(f"{task.name}: {results['tasks'][task.name]}\n")
    options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
