"""Compresses a fine-tune: two checkpoints in, an artifact out."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from deltazip_kernels.layout import LAYOUT_VERSION
from deltazip_ray.artifact.artifact import MANIFEST, ArtifactWriter
from deltazip_ray.artifact.blob import read_blob
from deltazip_ray.artifact.checkpoint import Checkpoint, base_digest
from deltazip_ray.artifact.lossless import read_verified
from deltazip_ray.artifact.manifest import BaseRef, BlobEntry, Manifest, blob_key
from deltazip_ray.artifact.object_store import ObjectStore
from deltazip_ray.artifact.requirements import check_quality
from deltazip_ray.artifact.store import open_store
from deltazip_ray.compress.allocation import allocate
from deltazip_ray.compress.blocks import BlockCompressor, States
from deltazip_ray.compress.calibration import Calibration, load_calibration
from deltazip_ray.compress.coding import Plan, kept_products
from deltazip_ray.compress.journal import Finished, Journal, resume_key
from deltazip_ray.compress.options import Coding, CompressOptions, Progress, silent
from deltazip_ray.compress.outer import OuterCompressor
from deltazip_ray.compress.outputs import Outputs
from deltazip_ray.compress.pairing import Pair, open_pair
from deltazip_ray.compress.parts import Parts
from deltazip_ray.compress.precision import float32_products
from deltazip_ray.compress.quality import finite, relative
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.survey import Surveyor
from deltazip_ray.compress.timeline import Timeline, within
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import BlobCorrupt, CompressionError, ConfigError, ObjectNotFound

OUTER = "outer"


def compress_checkpoint(
    base: Path,
    finetuned: Path,
    out: StoreConfig | str,
    options: CompressOptions | None = None,
    progress: Progress = silent,
    *,
    replace: bool = False,
) -> Manifest:
    """Compress ``finetuned`` to its difference from ``base`` and write the artifact to ``out``, a folder or a URL.

    An interrupted run is resumed if inputs and options are the same. An existing artifact is kept unless ``replace``.
    Weights are read block by block; the calibration states ``2 × [sequences, tokens, hidden]`` are on the host. Equal
    inputs give equal versions.
    Raises CheckpointInvalid, CheckpointMismatch, CompressionError, ConfigError, StoreError, and QualityTooLow. After an
    error there is no manifest, so ``out`` is not an artifact.
    """
    pair = open_pair(base, finetuned)
    store = open_store(out if isinstance(out, StoreConfig) else StoreConfig.at(out))
    store.create()
    if not replace and store.exists(MANIFEST):
        raise ConfigError(f"{store.url} already has an artifact: give another --out, or replace it with --force")
    return compress_pair(pair, store, options or CompressOptions(), progress)


@torch.no_grad()
def compress_pair(pair: Pair, store: ObjectStore, options: CompressOptions, progress: Progress = silent) -> Manifest:
    """:func:`compress_checkpoint` for an open pair and store; replaces an artifact in ``store``."""
    with float32_products("high" if options.device == "cuda" else "highest"):
        return _compress(pair, store, options, progress)


def _compress(pair: Pair, store: ObjectStore, options: CompressOptions, progress: Progress) -> Manifest:
    _check_codecs(pair, options)
    pair = replace(pair, products=kept_products(pair.products, options))
    line = Timeline.of(options)
    digest = _digest(pair.base, within(progress, "digest of the base", 0.0, line.digested))
    calibration = load_calibration(
        pair.finetuned,
        pair.skeleton,
        options,
        within(progress, "calibration data", line.digested, line.calibrated),
    )
    runner = Runner(pair.skeleton, calibration, options)
    journal, writer = Journal(store, resume_key(pair, digest, options)), ArtifactWriter(store)
    inside = within(progress, "sensitivity of each matrix", line.calibrated, line.surveyed)
    plan = Plan(options, _chosen(pair, runner, calibration, options, journal, inside), pair.products)
    outer = OuterCompressor(pair, runner, options, plan)
    blocks = Blocks(BlockCompressor(pair, runner, options, plan), runner, store, writer, journal)
    states = outer.embed(calibration)
    errors = {}
    for index in range(pair.skeleton.blocks):
        tell = within(progress, f"block {index + 1} of {pair.skeleton.blocks}", line.surveyed, line.coded)
        tell(index / pair.skeleton.blocks)
        states, errors[f"layers.{index}"] = blocks.finish(index, states)
    progress("head and quality", line.coded)
    outer.finish(states)
    quality = Outputs(pair, runner, calibration, outer.parts).record(states, errors, calibration.data)
    check_quality(quality, options.require)
    _add(writer, OUTER, outer.parts)
    for name, path in sorted(({"config.json": pair.finetuned.path / "config.json"} | pair.finetuned.files).items()):
        writer.add_file(name, path.read_bytes())
    manifest = writer.finish(
        layout_version=LAYOUT_VERSION,
        base=BaseRef(digest=digest, architecture=pair.skeleton.family.architecture, vocab_size=pair.base_vocab),
        added_tokens=pair.added,
        bytes_finetuned=_weight_bytes(pair),
        quality=quality,
    )
    journal.close()
    progress("done", 1.0)
    return manifest


@dataclass(frozen=True)
class Blocks:
    """Compresses the decoder blocks, or takes those that the journal has from the store."""

    compressor: BlockCompressor
    runner: Runner
    store: ObjectStore
    writer: ArtifactWriter
    journal: Journal

    def finish(self, index: int, states: States) -> tuple[States, float]:
        """The states after block ``index`` and its error; its blob is in the store then, and the journal records it."""
        done = self.journal.finished(index)
        if done is not None:
            # Blobs that are missing or damaged are made again.
            with suppress(ObjectNotFound, BlobCorrupt):
                return self._replay(index, states, done), done.error
        parts, states = self.compressor.compress(index, states)
        error = finite(_state_error(states, self.runner), f"block {index}")
        blob = _add(self.writer, f"layers.{index}", parts)
        self.journal.keep_block(index, Finished(blob=blob, error=error))
        return states, error

    def _replay(self, index: int, states: States, done: Finished) -> States:
        if done.blob is None:
            return self.compressor.replay(index, states, {}, {})
        data = read_verified(self.store, blob_key(done.blob.object_digest), done.blob)
        states = self.compressor.replay(index, states, done.blob.tensors, read_blob(data, done.blob))
        self.writer.adopt_blob(done.blob)
        return states


def _chosen(
    pair: Pair,
    runner: Runner,
    calibration: Calibration,
    options: CompressOptions,
    journal: Journal,
    progress: Callable[[float], None],
) -> dict[str, Coding]:
    """The coding of each matrix by bit allocation; empty without a target."""
    if not options.allocated:
        return {}
    if journal.codings is not None:
        return journal.codings
    survey = Surveyor(pair, runner, calibration, options).survey(progress)
    numbers = sum(prod(shape) for shape in pair.skeleton.shapes().values())
    chosen = allocate(survey.choices, survey.budget(options, numbers))
    codings = {name: choice.coding for name, choice in chosen.items()}
    journal.keep_codings(codings)
    return codings


def _check_codecs(pair: Pair, options: CompressOptions) -> None:
    """Raise CompressionError when the options name a matrix that does not exist."""
    matrices = {name for name, shape in pair.skeleton.shapes().items() if len(shape) == 2}
    unknown = sorted(options.codecs.keys() - matrices)
    if unknown:
        raise CompressionError(f"codecs names {unknown[0]}, which is not a matrix of {pair.finetuned.path}")


def _digest(base: Checkpoint, progress: Callable[[float], None]) -> str:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done / base.nbytes)

    return base_digest(base, advance)


def _state_error(states: States, runner: Runner) -> float:
    """Relative difference between the two models' states on the held-out sequences."""

    def held_out(hidden: Tensor) -> Tensor:
        return runner.place(hidden[runner.fitted :])[runner.mask[runner.fitted :]].float()

    ours = held_out(states.finetuned)
    return relative((held_out(states.compressed) - ours).square().sum(), ours.square().sum())


def _add(writer: ArtifactWriter, block: str, parts: Parts) -> BlobEntry | None:
    """Write a blob, unless it would be empty."""
    return writer.add_blob(block, parts.tensors, parts.entries) if parts.entries else None


def _weight_bytes(pair: Pair) -> int:
    shapes = pair.skeleton.shapes()
    return sum(prod(shape) * pair.finetuned.dtype(name).itemsize for name, shape in shapes.items())
