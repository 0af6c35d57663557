"""Kernels of codecs, compiled before the first version that has them is seen by a step."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from deltazip_kernels.launch import compiling
from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.layers.targets import DeltaTarget, MatrixTarget
from deltazip_ray.layers.triton_ops import TritonStack, ordered
from deltazip_ray.layers.warm_up import launch_all

_THREADS = min(8, os.cpu_count() or 1)
"""More would not help: tracing a kernel holds the interpreter for a fourth of the time or so."""


@dataclass
class _Wanted:
    """What a stack is to be ready for."""

    codecs: set[str] = field(default_factory=set)
    rank: int = 0


class CodecWarmUp:
    """Compiles for all stacks of an engine together; those alike share their kernels. Nothing to do on plain torch."""

    def __init__(self, targets: Mapping[str, DeltaTarget], vocab_size: int) -> None:
        """``vocab_size``: of the base; matrices with so many rows are looked up, too."""
        self._stacks: dict[str, TritonStack] = {}
        self._targets: dict[TritonStack, MatrixTarget] = {}
        for name, target in targets.items():
            if isinstance(target, MatrixTarget) and isinstance(target.stack, TritonStack):
                self._stacks[name] = target.stack
                self._targets[target.stack] = target
        self._vocab_size = vocab_size
        self._lock = threading.Lock()

    def codecs(self, codecs: Sequence[str]) -> None:
        """Be ready for versions with all matrices in one of ``codecs``; before the first step."""
        self._compile([(stack, (codec,), 0) for codec in codecs for stack in self._targets])

    def version(self, manifest: Manifest) -> None:
        """Be ready for a version beside those that are there; from the thread that loads it, before it is published."""
        wanted: dict[TritonStack, _Wanted] = {}
        for blob in manifest.blobs:
            for name, entry in blob.tensors.items():
                if name in self._stacks:
                    one = wanted.setdefault(self._stacks[name], _Wanted())
                    one.codecs.add(entry.codec)
                    one.rank = max(one.rank, entry.rank or 0)
        new = {
            stack: one for stack, one in wanted.items() if not one.codecs <= {*stack.codecs} or one.rank > stack.rank
        }
        if new:
            with self._lock:  # what two versions bring at once is compiled for both
                self._compile(
                    [
                        (stack, ordered({*stack.codecs, *one.codecs}), max(stack.rank, one.rank))
                        for stack, one in new.items()
                    ]
                )
                for stack, one in new.items():
                    stack.grow(one.codecs, one.rank)

    def _compile(self, wanted: Sequence[tuple[TritonStack, tuple[str, ...], int]]) -> None:
        """For each stack, codecs that share it and the largest rank: what steps then launch."""
        distinct = {
            (stack.shapes, type(self._targets[stack].base), codecs, rank): stack for stack, codecs, rank in wanted
        }
        with torch.inference_mode(), compiling(_THREADS):
            for (shapes, _, codecs, rank), stack in distinct.items():
                looked_up = len(shapes) == 1 and shapes[0][0] == self._vocab_size
                launch_all(stack, codecs, rank, self._targets[stack].base, looked_up=looked_up)
