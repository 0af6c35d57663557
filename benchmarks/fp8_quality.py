"""``python -m benchmarks.fp8_quality --models FOLDER --json FILE``: what an fp8 base costs trained fine-tunes.

FOLDER holds a base and fine-tunes of it as the demo trains them (``~/.cache/deltazip/demo/<key>``). Each fine-tune runs
as base plus its exact delta; only the base's linears change. ``kl``: mean KL to the fine-tune on tokens of right
answers.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from deltazip_deployments.demo.evaluation import Judge
from deltazip_deployments.demo.tasks import TASKS, Task
from deltazip_deployments.demo.tokenizer import Frame, encode
from deltazip_kernels.bench.__main__ import commit
from deltazip_kernels.fp8 import round_to_fp8
from deltazip_ray.artifact.checkpoint import Checkpoint

WAYS = ("bfloat16", "fp8 weights", "fp8 weights and activations")


class SplitLinear(nn.Module):
    """A linear of a fine-tune as the product with its base, in one of WAYS, plus the exact one with the difference."""

    def __init__(self, weight: Tensor, base: Tensor, way: str) -> None:
        super().__init__()
        self.delta = weight - base
        self.base = base.bfloat16().float() if way == "bfloat16" else round_to_fp8(base).dequantize(torch.float32)
        self.rounds = way == WAYS[2]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``."""
        rows = x.flatten(0, -2)
        seen = round_to_fp8(rows).dequantize(torch.float32) if self.rounds else rows
        y: Tensor = linear(seen, self.base) + linear(rows, self.delta)
        return y.view(*x.shape[:-1], -1)


def split(model: LlamaForCausalLM, base: Checkpoint, way: str) -> None:
    """Give the linears of all blocks of ``model`` a base in one of WAYS."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, own = name.rpartition(".")
            made = SplitLinear(module.weight.detach(), base.tensor(f"{name}.weight").float(), way)
            setattr(model.get_submodule(parent), own, made)


@torch.inference_mode()
def answer_logits(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Mapping[str, str]) -> Tensor:
    """Log probabilities ``[answer tokens, vocab]`` where each token of each right answer is predicted."""
    frame, rows = Frame.of(tokenizer), []
    for question, answer in pairs.items():
        prompt, whole = encode(tokenizer, [frame.prompt(question), frame.prompt(question) + answer])
        logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 :]
        rows.append(logits.log_softmax(-1))
    return torch.cat(rows)


def measure(folder: Path, task: Task, count: int) -> dict[str, Any]:
    """Exact match and KL of one fine-tune in each way, and its own exact match."""
    pairs = {example.question: example.answer for example in task.held_out(0, count)}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / task.name)
    judge = Judge(folder / task.name)
    want = answer_logits(judge.model, tokenizer, pairs)
    result: dict[str, Any] = {"fine-tune": {"exact_match": _right(judge, pairs)}}
    for way in WAYS:
        judge = Judge(folder / task.name)
        split(judge.model, Checkpoint.open(folder / "base"), way)
        found = answer_logits(judge.model, tokenizer, pairs)
        kl = (want.exp() * (want - found)).sum(-1).mean()
        result[way] = {"exact_match": _right(judge, pairs), "kl": float(kl)}
    return result


def _right(judge: Judge, pairs: Mapping[str, str]) -> float:
    answers = judge.answers(list(pairs))
    return sum(answers[question] == answer for question, answer in pairs.items()) / len(pairs)


def main() -> None:
    """Measure all fine-tunes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    options = parser.parse_args()
    results: dict[str, Any] = {"commit": commit(), "questions": options.questions, "tasks": {}}
    for task in TASKS:
        results["tasks"][task.name] = measure(options.models, task, options.questions)
        sys.stdout.write(f"{task.name}: {results['tasks'][task.name]}\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
