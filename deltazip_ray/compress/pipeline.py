"""From two checkpoints to an artifact."""

from collections.abc import Callable
from math import isfinite, prod
from pathlib import Path

import torch
from deltazip_kernels.layout import LAYOUT_VERSION
from torch import Tensor

from deltazip_ray.artifact.artifact import ArtifactWriter
from deltazip_ray.artifact.checkpoint import Checkpoint, base_digest
from deltazip_ray.artifact.manifest import BaseRef, Manifest, Quality
from deltazip_ray.artifact.store import open_store
from deltazip_ray.compress.blocks import BlockCompressor, States, relative
from deltazip_ray.compress.calibration import load_calibration
from deltazip_ray.compress.options import CompressOptions, Progress, silent
from deltazip_ray.compress.outer import OuterCompressor
from deltazip_ray.compress.pairing import Pair, open_pair
from deltazip_ray.compress.parts import Parts
from deltazip_ray.compress.runner import Runner
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import CompressionError

OUTER = "outer"
CALIBRATED, BLOCKS_DONE = 0.2, 0.95
"""Fractions of the whole that are done when these stages end, for progress."""
DIGESTED = 0.05


@torch.no_grad()
def compress_checkpoint(
    base: Path,
    finetuned: Path,
    out: StoreConfig | str,
    options: CompressOptions | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Compress ``finetuned`` to its difference from ``base`` and write the artifact to ``out`` (a URL or its settings).

    Holds the weights of one block of either checkpoint at a time, besides embedding and head and the calibration
    states ``2 × [sequences, tokens, hidden]``. Equal inputs give an equal version.
    Raises CheckpointInvalid, CheckpointMismatch, CompressionError, StoreError.
    """
    options = options or CompressOptions()
    pair = open_pair(base, finetuned)
    digest = _digest(pair.base, progress)
    calibration = load_calibration(
        pair.finetuned, pair.skeleton, options, _within(progress, "calibration data", DIGESTED, CALIBRATED)
    )
    runner = Runner(pair.skeleton, calibration, options)
    outer, blocks = OuterCompressor(pair, runner, options), BlockCompressor(pair, runner, options)
    writer = ArtifactWriter(open_store(StoreConfig(url=out) if isinstance(out, str) else out))
    states = outer.embed(calibration)
    errors = {}
    for index in range(pair.skeleton.blocks):
        share = (BLOCKS_DONE - CALIBRATED) / pair.skeleton.blocks
        progress(f"block {index + 1} of {pair.skeleton.blocks}", CALIBRATED + index * share)
        parts, states = blocks.compress(index, states)
        errors[f"layers.{index}"] = _finite(_state_error(states, runner), f"block {index}")
        _add(writer, f"layers.{index}", parts)
    progress("head and quality", BLOCKS_DONE)
    divergence = _finite(outer.finish(states), "the head")
    _add(writer, OUTER, outer.parts)
    for name, path in sorted(({"config.json": pair.finetuned.path / "config.json"} | pair.finetuned.files).items()):
        writer.add_file(name, path.read_bytes())
    manifest = writer.finish(
        layout_version=LAYOUT_VERSION,
        base=BaseRef(digest=digest, architecture=pair.skeleton.family.architecture, vocab_size=pair.base_vocab),
        added_tokens=pair.added,
        bytes_finetuned=_weight_bytes(pair),
        quality=Quality(data=calibration.data, block_errors=errors, kl_divergence=divergence),
    )
    progress("done", 1.0)
    return manifest


def _digest(base: Checkpoint, progress: Progress) -> str:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("digest of the base", DIGESTED * done / base.nbytes)

    return base_digest(base, advance)


def _within(progress: Progress, what: str, start: float, end: float) -> Callable[[float], None]:
    """Progress of a stage that takes the whole from ``start`` to ``end``."""
    return lambda fraction: progress(what, start + (end - start) * fraction)


def _state_error(states: States, runner: Runner) -> float:
    """Relative difference of the two states on the held-out sequences."""

    def held_out(hidden: Tensor) -> Tensor:
        return hidden[runner.fitted :][runner.mask[runner.fitted :]].float()

    ours = held_out(states.finetuned)
    return relative((held_out(states.compressed) - ours).square().sum(), ours.square().sum())


def _finite(measured: float, where: str) -> float:
    """Return what was measured. Raises CompressionError when it is not a number."""
    if not isfinite(measured):
        raise CompressionError(
            f"the outputs of {where} overflow on the calibration data: compress with dtype float32 or bfloat16, "
            "and check that base and fine-tune themselves give finite outputs"
        )
    return measured


def _add(writer: ArtifactWriter, block: str, parts: Parts) -> None:
    """Write a blob, unless the fine-tune left the block as it was."""
    if parts.entries:
        writer.add_blob(block, parts.tensors, parts.entries)


def _weight_bytes(pair: Pair) -> int:
    shapes = pair.skeleton.shapes()
    return sum(prod(shape) * pair.finetuned.dtype(name).itemsize for name, shape in shapes.items())
