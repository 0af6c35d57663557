"""Measures one fine-tune in all its forms, the most telling first, until a deadline: a line of the results each."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import LlamaForCausalLM

from benchmarks.quality.artifacts import Made, Workshop
from benchmarks.quality.data import Batch
from benchmarks.quality.judge import Judge
from benchmarks.quality.models import BASE, adapter_of
from benchmarks.quality.prepare import Prepared
from benchmarks.quality.scales import SCALES, Scale
from benchmarks.quality.training import RANK, Scales, block_matrices, fit
from deltazip_deployments.demo.corpus import IGNORED
from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.compress import solver
from deltazip_ray.compress.options import Coding

THREADS = 2
WAIT_S = 0.2
ADAPTER = "LoRA"
"""Is trained and measured after all others."""


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    tasks: tuple[str, ...]
    forms: tuple[str, ...]
    """Each of all tasks, before the next; none: all that there are."""
    scale: str
    cache: Path
    out: Path
    scratch: Path
    device: str
    deadline: float
    """Of ``time.time()``."""


def measure(job: Job) -> None:
    """Append a line to ``job.out`` for each form of each fine-tune that it lacks and that there is time for."""
    torch.set_num_threads(THREADS)
    job.scratch.mkdir()
    known = _measured(job.out)
    benches = {task: _bench(job, task) for task in job.tasks}
    names = job.forms or [name for name in next(iter(benches.values())).forms if name != ADAPTER]
    slowest = 0.0
    for name, task in product(names, job.tasks):
        if (name, task) in known:
            continue
        began = time.time()
        if began + slowest > job.deadline:
            return
        row = benches[task].row(name)
        with job.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        slowest = max(slowest, time.time() - began)


def _bench(job: Job, task: str) -> "Bench":
    """The bench of a fine-tune, once it is trained."""
    while not (job.cache / task).is_dir():
        time.sleep(WAIT_S)
    return Bench(job, task)


def _measured(out: Path) -> set[tuple[str, str]]:
    """The forms, and of which fine-tunes, that an earlier run has measured."""
    rows = map(json.loads, out.read_text().splitlines() if out.exists() else ())
    return {(row["variant"], row["task"]) for row in rows if "variant" in row}


class Bench:
    """One fine-tune and everything that it is compared with."""

    def __init__(self, job: Job, task: str) -> None:
        self._job, self._task = job, task
        self._scale: Scale = SCALES[job.scale]
        self._cache = job.cache
        prepared = Prepared(job.cache / "data")
        self._chats = prepared.chats(task)
        self._examples = prepared.examples(task)
        self._finetuned = self._load(task)
        self._model = LlamaForCausalLM.from_pretrained(job.cache / task, dtype=torch.float32)
        torch.nn.Module.to(self._model, job.device)
        questions, answers = prepared.held_out(task, self._scale)
        self._judge = Judge(
            self._model, prepared.tokenizer, questions, answers, prepared.windows(self._scale), self._finetuned
        )
        self._shop = Workshop(
            job.cache / BASE, job.cache / task, self._chats, self._scale.calibration, job.device, job.scratch / task
        )

    @cached_property
    def forms(self) -> dict[str, Callable[[], Made]]:
        """All that there are, the most telling first."""
        shop = self._shop
        return {
            "fine-tune": partial(self._whole, self._task),
            "base": partial(self._whole, BASE),
            "ours, ratio 12": partial(shop.targeted, target_ratio=12),
            "ours, bytes of 2:4 int2": partial(shop.targeted, target_ratio=shop.uniform_ratio("sparse24_int2")),
            "2:4 int2": partial(shop.compressed, codec="sparse24_int2"),
            "ours, bytes of 2:4 int4": partial(shop.targeted, target_ratio=shop.uniform_ratio("sparse24_int4")),
            "2:4 int4": partial(shop.compressed, codec="sparse24_int4"),
            "rounded int1": partial(shop.rounded, "int1"),
            "BitDelta": self._bitdelta,
            "low rank + residue, bytes of int1": partial(shop.factored, "int1", 0.5),
            "ours, int1 for all": partial(shop.compressed, codec="int1"),
            "ours, ratio 10": partial(shop.targeted, target_ratio=10),
            "ours, 2 bits": partial(shop.targeted, target_bits=2),
            "GPTQ int2": partial(self._direct, "int2"),
            "rounded int2": partial(shop.rounded, "int2"),
            "ours, ratio 16": partial(shop.targeted, target_ratio=16),
            "ours, int2 for all": partial(shop.compressed, codec="int2"),
            "no descent, int2": partial(self._without_descent, "int2"),
            "no descent, int1": partial(self._without_descent, "int1"),
            "low rank, bytes of int1": partial(shop.factored, "int1", 1.0),
            "low rank + residue, bytes of int2": partial(shop.factored, "int2", 0.5),
            "ours, 3 bits": partial(shop.targeted, target_bits=3),
            "ours, 1.5 bits": partial(shop.targeted, target_bits=1.5),
            "ours, error 1%": partial(shop.compressed, max_error=0.01),
            "GPTQ int4": partial(self._direct, "int4"),
            "SparseGPT 2:4 int4": partial(self._direct, "sparse24_int4"),
            "rounded int4": partial(shop.rounded, "int4"),
            "GPTQ int3": partial(self._direct, "int3"),
            "ours, 4 bits": partial(shop.targeted, target_bits=4),
            "ours, int3 for all": partial(shop.compressed, codec="int3"),
            "ours, int4 for all": partial(shop.compressed, codec="int4"),
            ADAPTER: self._adapter,
        }

    def row(self, name: str) -> dict[str, Any]:
        """Make one form and measure it."""
        if self._job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        made = self.forms[name]()
        peak = torch.cuda.max_memory_allocated() if self._job.device == "cuda" else None
        score = self._judge.score(made.weights)
        before = 2 * self._shop.parameters
        return {
            "task": self._task,
            "variant": name,
            "bytes_gpu": made.bytes_gpu,
            "bytes_stored": made.bytes_stored,
            "ratio_gpu": before / made.bytes_gpu if made.bytes_gpu else None,
            "ratio_stored": before / made.bytes_stored if made.bytes_stored else None,
            "exact_match": score.exact_match,
            "on_task": score.task._asdict(),
            "on_text": score.text._asdict(),
            "compress_s": made.seconds,
            "peak_bytes": peak,
            "codecs": dict(made.codecs),
        }

    def _whole(self, name: str) -> Made:
        """An uncompressed checkpoint; the base costs nothing beside itself."""
        size = 0 if name == BASE else 2 * self._shop.parameters
        return Made(self._load(name), size, size, 0.0)

    def _adapter(self) -> Made:
        """Base + LoRA."""
        matrices = block_matrices(self._model).values()
        size = sum(2 * RANK * (rows + columns) for rows, columns in (matrix.shape for matrix in matrices))
        return Made(self._load(adapter_of(self._task)), size, size, 0.0)

    def _without_descent(self, codec: Coding) -> Made:
        """The product's solver without its last stage."""
        with patch.object(solver, "SWEEPS", 0):
            return self._shop.compressed(codec=codec)

    def _bitdelta(self) -> Made:
        """One sign a weight and one scale a matrix (arXiv 2402.10193).

        Scales begin at the mean magnitude, and are then trained so that the logits come close to the fine-tune's.
        """
        began = time.monotonic()
        inside = set(block_matrices(self._model))
        base, signs, means = {}, {}, {}
        start = dict(self._finetuned)
        for name, before, after in self._shop.deltas():
            if name in inside:
                base[name] = before
                means[name] = (after - before).abs().mean()
                signs[name] = torch.where(after >= before, means[name], -means[name])
                start[name] = before + signs[name]
        student, teacher = self._copy(start), self._copy(self._finetuned)
        scales = Scales(student, base, signs)

        def loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
            with torch.no_grad():
                wanted = teacher(input_ids=batch.tokens).logits
            return mse_loss(model(input_ids=batch.tokens).logits.float(), wanted.float())

        fit(student, scales, self._calibration(), self._scale.distil, loss)
        made = self._shop.signs({name: mean * scales.logs[name].exp() for name, mean in means.items()})
        return Made(made.weights, made.bytes_gpu, made.bytes_stored, time.monotonic() - began, made.codecs)

    def _calibration(self) -> Any:
        """Batches of the chats that the other ways calibrate on, over and over."""
        size = self._scale.distil.batch
        tokens = self._examples.tokens[: self._scale.calibration].to(self._job.device)
        while True:
            for part in torch.split(tokens, size):
                yield Batch(part, torch.full_like(part, IGNORED))

    def _copy(self, weights: Mapping[str, Tensor]) -> LlamaForCausalLM:
        model = LlamaForCausalLM(self._model.config)
        torch.nn.Module.to(model, self._job.device)
        model.load_state_dict(dict(weights))
        return model

    def _load(self, name: str) -> dict[str, Tensor]:
        """A checkpoint's weights, float32 on the device."""
        weights = load_file(self._cache / name / "model.safetensors", device=self._job.device)
        return {key: weight.float() for key, weight in weights.items()}

    def _direct(self, codec: Coding) -> Made:
        """The fine-tune itself instead of its delta: against a base of zeros."""
        path = self._job.scratch / "zeros"
        if not path.is_dir():
            path.mkdir()
            checkpoint = Checkpoint.open(self._cache / BASE)
            (path / "config.json").write_bytes((checkpoint.path / "config.json").read_bytes())
            weights = {name: torch.zeros_like(checkpoint.tensor(name)) for name in checkpoint.names}
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return self._shop.compressed(path, codec=codec)
