"""Makes artifacts of one fine-tune, ours and the baselines', and brings their weights back."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.products import approximate, hessians
from deltazip_kernels.layout import CODECS, LAYOUT_VERSION
from deltazip_ray.artifact.artifact import ArtifactWriter, open_artifact
from deltazip_ray.artifact.blob import read_blob
from deltazip_ray.artifact.checkpoint import base_digest
from deltazip_ray.artifact.lossless import read_verified
from deltazip_ray.artifact.manifest import BaseRef, Manifest, blob_key
from deltazip_ray.artifact.store import open_store
from deltazip_ray.compress.allocation import allocate
from deltazip_ray.compress.calibration import load_calibration
from deltazip_ray.compress.choices import BLOB_HEADER, Survey, stored_bytes
from deltazip_ray.compress.grid import Coded
from deltazip_ray.compress.options import Coding, CompressOptions
from deltazip_ray.compress.pairing import Pair, open_pair
from deltazip_ray.compress.parts import Parts, rebuild
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import load_tensor
from deltazip_ray.compress.solver import nearest
from deltazip_ray.compress.survey import Surveyor
from deltazip_ray.config import CodecName, StoreConfig

Encode = Callable[[str, Tensor], tuple[Coding, Coded]]
"""Codes a matrix of that name, given its delta ``[N, K]``."""


@dataclass(frozen=True)
class Made:
    """One compressed form of a fine-tune."""

    weights: Mapping[str, Tensor]
    """All weights of the model that it stands for, by name, float32."""
    bytes_gpu: int
    """What a slot holds of it: all blobs, headers and norms included."""
    bytes_stored: int
    """The same as it lies in a store, through the lossless stage."""
    seconds: float
    """Of the compression."""
    codecs: Mapping[CodecName, int] = field(default_factory=dict)
    """How many tensors have each codec."""


class Workshop:
    """Compresses one fine-tune in any way that is asked for."""

    def __init__(self, base: Path, finetuned: Path, chats: Path, samples: int, device: str, folder: Path) -> None:
        """``chats`` is a calibration file of ``samples`` lines; artifacts go to new folders under ``folder``."""
        self.base, self.finetuned, self._folder = base, finetuned, folder
        self._settings: dict[str, Any] = {
            "calibration": chats,
            "samples": samples,
            "device": device,
            "batch_sequences": 256,
        }
        self._device = device
        self._pair = open_pair(base, finetuned)
        self._weights = {name: self._pair.base.tensor(name).to(device) for name in self._pair.base.names}
        self._survey: Survey | None = None
        self._survey_seconds = 0.0
        self._count = 0

    @property
    def parameters(self) -> int:
        """Numbers in the fine-tune."""
        return sum(weight.numel() for weight in self._weights.values())

    def uniform_ratio(self, codec: Coding) -> float:
        """How many times smaller the fine-tune is with ``codec`` for the matrices of its blocks, int4 around them."""
        inside = {name: ".layers." in name for name in self._weights}
        codings: dict[str, Coding] = {
            name: "raw" if weight.ndim == 1 else codec if inside[name] else "int4"
            for name, weight in self._weights.items()
        }
        size = sum(stored_bytes(name, self._weights[name], coding) for name, coding in codings.items())
        return 2 * self.parameters / (size + BLOB_HEADER * len(self._blocks()))

    def compressed(self, base: Path | None = None, **options: Any) -> Made:
        """By the product, with these options; against another ``base`` when one is given."""
        out = self._new()
        settings = CompressOptions(**self._settings, **options)
        began = time.monotonic()
        manifest = compress_checkpoint(base or self.base, self.finetuned, out.as_uri(), settings)
        return self._made(out, manifest, time.monotonic() - began, None if base is None else {})

    def targeted(self, **target: float) -> Made:
        """By the product, for a target. The survey is the same for all targets, so it is made once.

        The time is that of survey and compression together.
        """
        settings = CompressOptions(**self._settings, **target)
        if self._survey is None:
            began = time.monotonic()
            self._survey = self._surveyed(settings)
            self._survey_seconds = time.monotonic() - began
        chosen = allocate(self._survey.choices, self._survey.budget(settings, self.parameters))
        made = self.compressed(codecs={name: choice.coding for name, choice in chosen.items()})
        return Made(made.weights, made.bytes_gpu, made.bytes_stored, made.seconds + self._survey_seconds, made.codecs)

    def rounded(self, coding: Coding) -> Made:
        """Every delta rounded to nearest on group scales of least squared error; no calibration, no compensation."""

        def encode(name: str, delta: Tensor) -> tuple[Coding, Coded]:
            codec: Coding = coding if ".layers." in name else "int4"
            return codec, nearest(delta, CODECS[codec])

        return self._coded(encode)

    def signs(self, scales: Mapping[str, Tensor]) -> Made:
        """The signs of the blocks' deltas with one scale for each matrix, embedding and head as in :meth:`rounded`.

        Counted as 1 bit a weight and a scale of 2 bytes a matrix, though the artifact repeats the scale in each group.
        """

        def encode(name: str, delta: Tensor) -> tuple[Coding, Coded]:
            if name not in scales:
                return "int4", nearest(delta, CODECS["int4"])
            groups = delta.new_ones(delta.shape[0], -(-delta.shape[1] // 128))
            # A level of int1 is half a scale away from zero.
            return "int1", Coded((delta >= 0).byte(), (2 * scales[name] * groups).bfloat16().float(), None)

        made = self._coded(encode)
        spared = sum(2 * self._weights[name].numel() // 128 - 2 for name in scales)
        return Made(made.weights, made.bytes_gpu - spared, made.bytes_stored, made.seconds, made.codecs)

    def factored(self, codec: Coding, share: float) -> Made:
        """The blocks' deltas as products of low rank and sparse residues, in the bytes of ``codec``.

        ``share`` of them is for the products. Embedding and head as in :meth:`rounded`. No artifact: the residue has
        no layout of its own.
        """
        began = time.monotonic()
        weights, sizes = {}, 0
        torch.manual_seed(0)
        with torch.no_grad():
            for names, block, metric in hessians(self._pair, CompressOptions(**self._settings)):
                for name in names:
                    full = block.full(name)
                    room = stored_bytes(full, self._weights[full], codec)
                    kept, size = approximate(block.delta(name), metric, room, share)
                    weights[full] = self._weights[full].float() + kept
                    sizes += size
        for name, base, finetuned in self.deltas():
            if name not in weights:
                coding: Coding = "raw" if base.ndim == 1 else "int4"
                delta = finetuned - base
                weights[name] = base + (
                    delta if coding == "raw" else nearest(delta, CODECS[coding]).dequantized(CODECS[coding])
                )
                sizes += stored_bytes(name, self._weights[name], coding)
        return Made(weights, sizes, sizes, time.monotonic() - began)

    def deltas(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, base and fine-tune of every weight, float32 on the device."""
        for name, weight in self._weights.items():
            yield name, weight.float(), load_tensor(self._pair.finetuned, name).to(self._device).float()

    def _coded(self, encode: Encode) -> Made:
        """An artifact whose matrices are coded one by one, without looking at any input."""
        out = self._new()
        began = time.monotonic()
        parts = {block: Parts(self._pair.finetuned) for block in self._blocks()}
        for name, base, finetuned in self.deltas():
            block = parts[self._home(name)]
            if finetuned.ndim == 1:
                block.add_raw(name, load_tensor(self._pair.finetuned, name))
            else:
                coding, coded = encode(name, finetuned - base)
                block.add_coded(name, coded, coding, 0.0)
        manifest = _write(self._pair, out, parts)
        return self._made(out, manifest, time.monotonic() - began, None)

    def _surveyed(self, settings: CompressOptions) -> Survey:
        """As the product makes it."""
        with torch.no_grad():
            calibration = load_calibration(self._pair.finetuned, self._pair.skeleton, settings, lambda fraction: None)
            runner = Runner(self._pair.skeleton, calibration, settings)
            return Surveyor(self._pair, runner, calibration, settings).survey(lambda fraction: None)

    def _made(self, out: Path, manifest: Manifest, seconds: float, base: Mapping[str, Tensor] | None) -> Made:
        """Read an artifact back, by the arithmetic of ``deltazip merge``. ``base`` {}: it was made against zeros."""
        store = open_artifact(out)[1]
        weights = {
            name: torch.zeros_like(weight) if base is not None else weight for name, weight in self._weights.items()
        }
        for blob in manifest.blobs:
            data = read_verified(store, blob_key(blob.object_digest), blob)
            tensors = {key: tensor.to(self._device) for key, tensor in read_blob(data, blob).items()}
            for name in blob.tensors:
                weights[name] = rebuild(name, weights[name], blob.tensors, tensors)
        codecs = Counter(entry.codec for blob in manifest.blobs for entry in blob.tensors.values())
        floats = {name: weight.float() for name, weight in weights.items()}
        stored = sum(blob.object_size for blob in manifest.blobs)
        return Made(floats, manifest.bytes_artifact, stored, seconds, dict(codecs))

    def _blocks(self) -> list[str]:
        return ["outer", *(f"layers.{index}" for index in range(self._pair.skeleton.blocks))]

    def _home(self, name: str) -> str:
        """The blob that a weight belongs to."""
        return ".".join(name.split(".")[1:3]) if ".layers." in name else "outer"

    def _new(self) -> Path:
        self._count += 1
        return self._folder / f"artifact-{self._count}"


def _write(pair: Pair, out: Path, parts: Mapping[str, Parts]) -> Manifest:
    store = open_store(StoreConfig(url=out.as_uri()))
    store.create()
    writer = ArtifactWriter(store)
    for block, part in parts.items():
        writer.add_blob(block, part.tensors, part.entries)
    return writer.finish(
        layout_version=LAYOUT_VERSION,
        base=BaseRef(
            digest=base_digest(pair.base), architecture=pair.skeleton.family.architecture, vocab_size=pair.base_vocab
        ),
        bytes_finetuned=pair.finetuned.nbytes,
    )
