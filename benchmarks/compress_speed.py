"""How long compression takes, stage by stage, and how much GPU memory.

Checkpoints are random: speed does not depend on the values. All blocks have the weights of one random block, which lie
in host memory as a file's pages would: reading them is a copy from host memory, not from a disk. Everything else is
the compressor as ``deltazip compress`` runs it: digests, calibration, bit allocation, coding, writing, quality.
"""

import argparse
import json
import platform
import random
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.compress_table import page
from benchmarks.stopwatch import Stopwatch
from deltazip_ray.artifact.artifact import ArtifactWriter
from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.artifact.store import open_store
from deltazip_ray.compress import blocks, journal, pipeline, solver, survey
from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.options import CompressOptions, Progress
from deltazip_ray.compress.outer import OuterCompressor
from deltazip_ray.compress.outputs import Outputs
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.parts import Parts
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import Skeleton
from deltazip_ray.config import StoreConfig

SHAPES = {
    "8b": {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 128256},
    "tiny": {"hidden": 128, "intermediate": 320, "layers": 3, "heads": 4, "kv": 2, "vocab": 300},
}
STAGES: tuple[tuple[Any, str, str], ...] = (
    (pipeline, "base_digest", "digests of the checkpoints"),
    (journal, "base_digest", "digests of the checkpoints"),
    (pipeline, "load_calibration", "calibration data"),
    (blocks, "read_block", "reading blocks"),
    (survey, "read_block", "reading blocks"),
    (survey.Surveyor, "survey", "sensitivity: products of gradients and errors"),
    (survey.Surveyor, "_outer", "embedding and head"),
    (survey.Surveyor, "_embedding", "embedding and head"),
    (OuterCompressor, "embed", "embedding and head"),
    (OuterCompressor, "finish", "embedding and head"),
    (Outputs, "record", "embedding and head"),
    (Runner, "run", "forward passes"),
    (Runner, "visit_inputs", "forward passes"),
    (Runner, "backward", "gradients"),
    (Hessian, "add", "Hessians"),
    (Hessian, "squared_norm", "errors of matrices"),
    (solver, "inverse_factor", "factorizations"),
    (solver.Solver, "solve", "solving"),
    (Parts, "add", "packing"),
    (ArtifactWriter, "add_blob", "writing blobs"),
)
"""Functions whose own time, without that of others here that they call, is told."""


class RandomCheckpoint(Checkpoint):
    """A checkpoint whose blocks are all ``block`` (names inside the block) and whose other weights are ``outer``."""

    def __init__(self, path: Path, config: dict[str, Any], block: dict[str, Tensor], outer: dict[str, Tensor]) -> None:
        super().__init__(path, config, {}, {})
        self._weights = dict(outer)
        for index in range(config["num_hidden_layers"]):
            self._weights |= {f"model.layers.{index}.{name}": tensor for name, tensor in block.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._weights))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._weights.values())

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._weights[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self._weights[name]


def make_pair(folder: Path, shape: dict[str, int], device: torch.device) -> Pair:
    """A random base in bf16 and a fine-tune that moved every matrix, with a tokenizer of as many words as tokens."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {f"w{i}": i for i in range(shape["vocab"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    probe = RandomCheckpoint(folder, config, {}, {})
    skeleton = Skeleton(probe)
    shapes, prefix = skeleton.shapes(), f"{skeleton.block_name(0)}."
    generator = torch.Generator(device).manual_seed(0)
    base: dict[str, Tensor] = {}
    tuned: dict[str, Tensor] = {}
    for name in [n for n in shapes if n.startswith(prefix) or ".layers." not in n]:
        norm = len(shapes[name]) == 1
        weight = torch.randn(shapes[name], generator=generator, device=device).mul_(0 if norm else 0.02).add_(norm)
        base[name] = weight.bfloat16().cpu()
        moved = weight.add_(torch.randn(shapes[name], generator=generator, device=device), alpha=0.002)
        tuned[name] = base[name] if norm else moved.bfloat16().cpu()
    checkpoints = [
        RandomCheckpoint(
            folder,
            config,
            {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)},
            {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)},
        )
        for weights in (base, tuned)
    ]
    return Pair(checkpoints[0], checkpoints[1], skeleton, shape["vocab"], 0)


def write_text(path: Path, vocab: int, tokens: int) -> Path:
    """``tokens`` random words of the tokenizer."""
    words = random.Random(0).choices(range(vocab), k=tokens)
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


class Measured(NamedTuple):
    """One compression."""

    manifest: Manifest
    stages: dict[str, float]
    """Seconds."""
    peaks: dict[str, int]
    """Bytes on the GPU at most, by stage."""
    seconds: float


def measure(pair: Pair, options: CompressOptions, out: Path) -> Measured:
    """Compress, with a clock on every stage; prints how far it is."""
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch(torch.device(options.device))
    undo = [watch.watch(*stage) for stage in STAGES]
    store = open_store(StoreConfig(url=out.as_uri()))
    store.create()
    start = time.perf_counter()

    def tell(what: str, fraction: float) -> None:
        passed = time.perf_counter() - start
        print(f"{time.strftime('%T')}  {passed:7.1f} s  {fraction:6.1%}  {what}", flush=True)

    try:
        with watch.stage("the rest"):
            manifest = pipeline.compress_pair(pair, store, options, rarely(tell))
    finally:
        for each in undo:
            each()
    peaks = {name: watch.peaks[name] for name in watch.seconds}
    return Measured(manifest, dict(watch.seconds), peaks, time.perf_counter() - start)


def rarely(tell: Progress) -> Progress:
    """``tell`` of every stage and of every hundredth of the whole."""
    last = ("", -1.0)

    def progress(what: str, fraction: float) -> None:
        nonlocal last
        if what != last[0] or fraction >= last[1] + 0.01:
            last = (what, fraction)
            tell(what, fraction)

    return progress


def gpu_memory(pair: Pair, options: CompressOptions, peaks: dict[str, int]) -> dict[str, Any]:
    """Bytes on the GPU: the peaks, and what bounds them."""
    prefix = f"{pair.skeleton.block_name(0)}."
    block = sum(2 * pair.base.tensor(name).nbytes for name in pair.base.names if name.startswith(prefix))
    width = torch.finfo(options.torch_dtype).bits // 8
    hidden = pair.skeleton.config.hidden_size
    states = 2 * options.samples * options.sequence_length * hidden * width
    return {
        "peak": max(peaks.values(), default=0),
        "peaks": dict(sorted(peaks.items(), key=lambda item: -item[1])),
        "two_blocks_of_both": 2 * block,
        "calibration_states": states,
    }


def report(pair: Pair, options: CompressOptions, found: Measured, args: argparse.Namespace) -> dict[str, Any]:
    manifest = found.manifest
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    codecs = Counter(entry.codec for blob in manifest.blobs for entry in blob.tensors.values())
    return {
        "commit": args.commit or commit or "unknown",
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": args.shape,
        "layers": pair.skeleton.blocks,
        "options": options.model_dump(mode="json", exclude_defaults=True, exclude={"calibration"}),
        "seconds": found.seconds,
        "stages": dict(sorted(found.stages.items(), key=lambda item: -item[1])),
        "memory": gpu_memory(pair, options, found.peaks),
        "bytes_finetuned": manifest.bytes_finetuned,
        "bytes_artifact": manifest.bytes_artifact,
        "codecs": codecs,
        "quality": manifest.quality.model_dump() if manifest.quality else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="blocks, if not as many as the shape has")
    parser.add_argument("--target-bits", type=float, help="without, int2 for all matrices of the blocks")
    parser.add_argument("--dtype", default="float32", help="of the forward passes")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--commit", help="the commit to record, where the checkout is not at hand")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[args.shape] | ({"layers": args.layers} if args.layers else {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = write_text(folder / "text.txt", shape["vocab"], 2 * args.samples * args.sequence_length)
        pair = make_pair(folder, shape, torch.device(device))
        goal = {"codec": "int2"} if args.target_bits is None else {"target_bits": args.target_bits}
        options = CompressOptions.model_validate(
            goal
            | {"calibration": text, "samples": args.samples, "sequence_length": args.sequence_length}
            | {"device": device, "dtype": args.dtype}
        )
        found = report(pair, options, measure(pair, options, folder / "artifact"), args)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{page(found)}\n\n{dict(found['codecs'])}")


if __name__ == "__main__":
    main()
