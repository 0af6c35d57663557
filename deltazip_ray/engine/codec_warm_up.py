"""Kernels of codecs, compiled before the first version that has them is seen by a step."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.layers.targets import DeltaTarget, MatrixTarget
from deltazip_ray.layers.triton_ops import TritonStack, ordered
from deltazip_ray.layers.warm_up import warm_stack


@dataclass
class _Wanted:
    """What a stack is to be ready for."""

    codecs: set[str] = field(default_factory=set)
    rank: int = 0


class CodecWarmUp:
    """Remembers what is compiled; stacks of one shape share their kernels. Does nothing for ops without any."""

    def __init__(self, targets: Mapping[str, DeltaTarget], vocab_size: int) -> None:
        """``vocab_size``: of the base; matrices with so many rows are looked up, too."""
        self._stacks = {
            name: target.stack
            for name, target in targets.items()
            if isinstance(target, MatrixTarget) and isinstance(target.stack, TritonStack)
        }
        self._lock = threading.Lock()
        self._vocab_size = vocab_size
        self._done: set[tuple[object, ...]] = set()

    def codecs(self, codecs: Sequence[str]) -> None:
        """Be ready for versions with all matrices in one of ``codecs``; before the first step."""
        stacks = {stack.shapes: stack for stack in self._stacks.values()}.values()
        # One after the other: Triton is not made for several threads that compile.
        for codec in codecs:
            for stack in stacks:
                self._compile(stack, (codec,), 0)

    def version(self, manifest: Manifest) -> None:
        """Be ready for a version beside those that are there; from the thread that loads it, before it is published."""
        wanted: dict[TritonStack, _Wanted] = {}
        for blob in manifest.blobs:
            for name, entry in blob.tensors.items():
                if name in self._stacks:
                    one = wanted.setdefault(self._stacks[name], _Wanted())
                    one.codecs.add(entry.codec)
                    one.rank = max(one.rank, entry.rank or 0)
        new = [stack for stack, one in wanted.items() if not one.codecs <= {*stack.codecs} or one.rank > stack.rank]
        if new:
            with self._lock:  # what two versions bring at once is compiled for both
                for stack in new:
                    codecs = ordered({*stack.codecs, *wanted[stack].codecs})
                    self._compile(stack, codecs, max(stack.rank, wanted[stack].rank))
                    stack.grow(wanted[stack].codecs, wanted[stack].rank)

    def _compile(self, stack: TritonStack, codecs: tuple[str, ...], rank: int) -> None:
        looked_up = stack.shapes[0][0] == self._vocab_size
        key = (stack.shapes, codecs, rank, looked_up)
        if key not in self._done:
            with torch.inference_mode():
                warm_stack(stack, codecs, rank, looked_up=looked_up)
            self._done.add(key)
