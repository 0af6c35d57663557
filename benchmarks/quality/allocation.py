"""Bit allocation against one codec for all, at equal bytes.

    python benchmarks/quality/allocation.py --cache ~/.cache/deltazip/quality --out quality_allocation.jsonl

Trains the demo's base and its five fine-tunes at twice the demo's width (cached), compresses each fine-tune with one
codec for all matrices of its blocks, with and without the coordinate descent that ends the solver, and then with a
target that allows as many bytes, by two measures of sensitivity: what an error costs in KL (the product's own) and the
plain relative output error of a matrix. Each line of the result is one artifact: bytes, KL against the fine-tune on
fresh chats, exact match of greedy answers.
"""

import argparse
import json
import platform
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltazip_deployments.demo import training
from deltazip_deployments.demo.checkpoints import CheckpointCache
from deltazip_deployments.demo.evaluation import Judge
from deltazip_deployments.demo.recipe import Phase, Recipe
from deltazip_deployments.demo.tasks import TASKS, Example, Task
from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.compress import solver
from deltazip_ray.compress.allocation import Choice, allocate
from deltazip_ray.compress.choices import stored_bytes
from deltazip_ray.compress.merge import merge
from deltazip_ray.compress.options import Coding, CompressOptions
from deltazip_ray.compress.pipeline import compress_checkpoint

RECIPE = Recipe(
    hidden=256,
    intermediate=768,
    threads=1,
    pretrain=Phase(steps=700, batch=48, peak_lr=2e-3),
    finetune=Phase(steps=120, batch=48, peak_lr=4e-4),
)
"""3.2 M parameters; 256 columns are two groups, so that the packed layout pads next to nothing."""
UNIFORM: tuple[Coding, ...] = ("int4", "int3", "int2", "int1", "sparse24_int4", "sparse24_int2")
LADDER: tuple[Coding, ...] = ("int1", "int2", "int3", "int4")
MATCHED: tuple[Coding, ...] = ("int3", "int2", "int1")
"""Codecs whose bytes the chosen mixtures are given."""
RATIOS = (8, 12)
CALIBRATION, FRESH, SEED = 128, 300, 7


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cache", type=Path, required=True, help="folder for the trained models")
    arguments.add_argument("--out", type=Path, required=True, help="JSON lines")
    arguments.add_argument("--tasks", nargs="*", default=[task.name for task in TASKS])
    given = arguments.parse_args()
    with given.out.open("w") as out:
        for bench in benches(RECIPE, given.cache, given.tasks):
            for row in bench.rows():
                out.write(json.dumps(row | machine()) + "\n")
                out.flush()


def benches(recipe: Recipe, folder: Path, tasks: Sequence[str]) -> Iterator["Bench"]:
    """The fine-tunes of some tasks, trained or from ``folder``."""
    torch.set_num_threads(recipe.threads)
    sources = [Path(training.__file__).with_name(f"{name}.py") for name in ("corpus", "tasks", "tokenizer", "training")]
    cache = CheckpointCache(folder, recipe.key(sources))
    base = cache.get("base", partial(training.train_base, recipe, advance=lambda: None))
    for task in TASKS:
        if task.name in tasks:
            make = partial(training.finetune, recipe, task, base, advance=lambda: None)
            yield Bench(base, cache.get(task.name, make), task)


class Bench:
    """One fine-tune in all its forms."""

    def __init__(self, base: Path, finetuned: Path, task: Task) -> None:
        self.base, self.finetuned, self.task = base, finetuned, task
        self.questions = task.held_out(SEED, FRESH)
        self.tokens, self.mask = chats(finetuned, self.questions)
        self.reference = logits(finetuned, self.tokens, self.mask)
        self.model = AutoModelForCausalLM.from_pretrained(finetuned)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One line for each artifact."""
        uniform: dict[Coding, Manifest] = {}
        for codec in UNIFORM:
            row, uniform[codec] = self.measure("uniform", codec, {"codec": codec})
            yield row
        with patch.object(solver, "SWEEPS", 0):
            for codec in MATCHED:
                yield self.measure("no descent", codec, {"codec": codec})[0]
        numbers = self.model.num_parameters()
        for codec in MATCHED:
            size = uniform[codec].bytes_artifact
            yield self.measure("kl", codec, {"target_ratio": 2 * numbers / size})[0]
            yield self.measure("output error", codec, {"codecs": self.by_output_error(uniform, codec)})[0]
        for ratio in RATIOS:
            yield self.measure("kl", f"ratio {ratio}", {"target_ratio": ratio})[0]

    def by_output_error(self, uniform: dict[Coding, Manifest], codec: Coding) -> dict[str, Coding]:
        """Codecs that minimize the sum of squared relative output errors in the bytes of ``uniform[codec]``."""
        weights = self.model.state_dict()
        entries = {
            each: {name: entry for blob in uniform[each].blobs for name, entry in blob.tensors.items()}
            for each in LADDER
        }
        choices = {
            name: [
                Choice(each, stored_bytes(name, weights[name], each), (entries[each][name].relative_error or 0.0) ** 2)
                for each in LADDER
            ]
            for name, entry in entries[codec].items()
            if entry.codec != "raw" and ".layers." in name
        }
        budget = sum(next(c.size for c in options if c.coding == codec) for options in choices.values())
        return {name: choice.coding for name, choice in allocate(choices, budget).items()}

    def measure(self, rule: str, at: str, options: dict[str, Any]) -> tuple[dict[str, Any], Manifest]:
        """Compress, merge, and compare with the fine-tune under transformers."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            data = folder / "chats.jsonl"
            data.write_text("".join(chat(example) + "\n" for example in self.task.training(SEED, CALIBRATION)))
            settings = CompressOptions.model_validate({"calibration": data, "samples": CALIBRATION} | options)
            manifest = compress_checkpoint(self.base, self.finetuned, (folder / "artifact").as_uri(), settings)
            merge(self.base, folder / "artifact", folder / "merged", dtype=torch.float32)
            found = logits(folder / "merged", self.tokens, self.mask)
            answers = Judge(folder / "merged").answers([each.question for each in self.questions])
        divergence = (self.reference.exp() * (self.reference - found)).sum(-1)
        right = sum(answers[each.question] == each.answer for each in self.questions)
        codecs = Counter(entry.codec for blob in manifest.blobs for entry in blob.tensors.values())
        row = {
            "task": self.task.name,
            "rule": rule,
            "at": at,
            "bytes": manifest.bytes_artifact,
            "ratio": 2 * self.model.num_parameters() / manifest.bytes_artifact,
            "kl": float(divergence.mean()),
            "kl_standard_error": float(divergence.std() / len(divergence) ** 0.5),
            "exact_match": right / len(self.questions),
            "codecs": dict(codecs),
        }
        return row, manifest


def chat(example: Example) -> str:
    """A question with its right answer, as a line of a calibration file."""
    messages = [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.answer}]
    return json.dumps({"messages": messages})


def chats(path: Path, examples: tuple[Example, ...]) -> tuple[Tensor, Tensor]:
    """The examples as tokens and mask ``[chats, tokens]``, padded at the right."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [
        tokenizer.apply_chat_template(json.loads(chat(example))["messages"], tokenize=False) for example in examples
    ]
    rows = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


@torch.no_grad()
def logits(path: Path, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities ``[unpadded tokens, vocab]`` of the model at ``path``, in float32."""
    found: Tensor = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
    return found[mask].log_softmax(-1)


def machine() -> dict[str, str]:
    """What the numbers were taken with."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return {"commit": commit.stdout.strip(), "torch": torch.__version__, "machine": platform.processor() or "cpu"}


if __name__ == "__main__":
    main()
