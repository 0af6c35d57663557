"""Compiles the kernels of codecs before a step uses the first version with them."""

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from deltazip_kernels import LOW_RANK
from deltazip_kernels.launch import compiling
from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.layers.targets import DeltaTarget, MatrixTarget
from deltazip_ray.layers.triton_ops import TritonStack, ordered
from deltazip_ray.layers.warm_up import launch_all

logger = logging.getLogger(__name__)

_AT_START = min(16, os.cpu_count() or 1)
_BESIDE_STEPS = 3
"""Compiling threads while steps run: tracing a kernel, about a fourth of the work, needs the GIL as the steps do."""


class Later(ThreadPoolExecutor):
    """After ``closed`` is set, queued calls fail instead of running: cancelled ones would leave waiters waiting."""

    closed = False

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        """See the base class."""
        return super().submit(self._unless_closed, work, *args, **options)

    def _unless_closed(self, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.closed:
            raise RuntimeError("nobody waits for this any more")
        return work(*args, **options)


@dataclass
class _Wanted:
    """What a stack must have kernels for."""

    codecs: set[str] = field(default_factory=set)
    rank: int = 0

    def is_new(self, stack: TritonStack) -> bool:
        """Whether the stack lacks some of the kernels."""
        return not self.codecs <= stack.codecs or self.rank > stack.rank

    def missing(self, stack: TritonStack) -> tuple[str, ...]:
        """The codecs that the stack has no kernels for."""
        return ordered(self.codecs - stack.codecs | ({LOW_RANK} if self.rank > stack.rank else set()))


class CodecWarmUp:
    """Compiles for all stacks of an engine; equal stacks share kernels. Does nothing without Triton."""

    def __init__(self, targets: Mapping[str, DeltaTarget], vocab_size: int) -> None:
        """``vocab_size`` of the base; matrices with this many rows also need lookups."""
        self._stacks: dict[str, TritonStack] = {}
        self._targets: dict[TritonStack, MatrixTarget] = {}
        for name, target in targets.items():
            if isinstance(target, MatrixTarget) and isinstance(target.stack, TritonStack):
                self._stacks[name] = target.stack
                self._targets[target.stack] = target
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._joins = ThreadPoolExecutor(1, thread_name_prefix="deltazip-join")
        self._later = Later(1, thread_name_prefix="deltazip-compile")

    def codecs(self, codecs: Sequence[str]) -> None:
        """Compile for versions with any matrix in any of ``codecs``, before the first step.

        A launch that no version needs costs little per step; recording a step again costs more.
        """
        with _threads(_AT_START) as pool:
            self._compile([(stack, ordered({*codecs}), 0) for stack in self._targets], pool)
        for stack in self._targets:
            stack.grow({*codecs}, 0)

    def version(self, manifest: Manifest) -> None:
        """Compile for one more version. Called by the thread that loads it, before it is published.

        New codecs are compiled for separate launches first. Kernels that serve them and the others in one launch are
        compiled later, while steps run.
        """
        wanted = defaultdict[TritonStack, _Wanted](_Wanted)
        for blob in manifest.blobs:
            for name, entry in blob.tensors.items():
                if name in self._stacks:
                    one = wanted[self._stacks[name]]
                    one.codecs.add(entry.codec)
                    one.rank = max(one.rank, entry.rank or 0)
        if any(one.is_new(stack) for stack, one in wanted.items()):
            with self._lock, _threads(_BESIDE_STEPS) as pool:  # compile once what two concurrent loads need
                new = {stack: one for stack, one in wanted.items() if one.is_new(stack)}
                self._compile([(stack, one.missing(stack), one.rank) for stack, one in new.items()], pool)
                for stack, one in new.items():
                    stack.grow(one.codecs, one.rank)
            self._joins.submit(self._join).add_done_callback(self._tell)

    def close(self) -> None:
        """Drop background compilations, and wait for the one that runs; no more versions will be loaded.

        The process's next engine would find those that are left in Triton's cache, and fail with them.
        """
        self._later.closed = True
        self._joins.shutdown()

    def _join(self) -> None:
        """Replace several launches of a stack by one."""
        several = [stack for stack in self._targets if len(stack.groups) > 1]
        joined = [(stack, ordered(stack.codecs), stack.rank) for stack in several]
        self._compile(joined, self._later)
        for stack, codecs, _ in joined:
            stack.join({*codecs})

    def _compile(self, wanted: Sequence[tuple[TritonStack, tuple[str, ...], int]], pool: Executor) -> None:
        """Compile the kernels for (stack, codecs in one launch, largest rank)."""
        distinct = {
            (stack.shapes, type(self._targets[stack].base), codecs, rank): stack for stack, codecs, rank in wanted
        }
        with torch.inference_mode(), compiling(pool):
            for (shapes, _, codecs, rank), stack in distinct.items():
                looked_up = len(shapes) == 1 and shapes[0][0] == self._vocab_size
                launch_all(stack, codecs, rank, self._targets[stack].base, looked_up=looked_up)

    def _tell(self, job: Future[None]) -> None:
        if not self._later.closed and (error := job.exception()) is not None:
            logger.error("several codecs stay in launches of their own: one for all was not compiled", exc_info=error)


def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="deltazip-compile")
