"""The inputs of a captured step: device memory at fixed addresses, filled by one copy."""

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch

from deltazip_ray.layers.attention.capture import CapturableBackend
from deltazip_ray.layers.staging import staged
from deltazip_ray.scheduler.batch import Batch, Chunk

_ALIGNMENT = 16


class StepBuffer:
    """Named arrays in one buffer, on the host and at fixed addresses of the device."""

    def __init__(self, fields: Mapping[str, tuple[int, type[np.generic]]], device: torch.device) -> None:
        """``fields``: (size, dtype) by name. Only a part of the last one need be sent."""
        self.arrays: dict[str, np.ndarray] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        sizes = {name: count * np.dtype(kind).itemsize for name, (count, kind) in fields.items()}
        total = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values())
        self._host = np.zeros(total, dtype=np.uint8)
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        start = 0
        for name, (_, kind) in fields.items():
            here = slice(start, start + sizes[name])
            self.arrays[name] = self._host[here].view(kind)
            self.tensors[name] = self._device[here].view(torch.from_numpy(self.arrays[name]).dtype)
            self._last = start, np.dtype(kind).itemsize
            start += -(-sizes[name] // _ALIGNMENT) * _ALIGNMENT

    def send(self, last: int) -> None:
        """Enqueue the copy of all fields, with ``last`` entries of the last one."""
        start, size = self._last
        stop = start + last * size
        self._device[:stop].copy_(staged(self._host[:stop], self._device.device), non_blocking=True)


class RecordedInputs:
    """Tokens, positions, versions and attention's tables of steps with one token per row."""

    def __init__(
        self, attention: CapturableBackend[Any], device: torch.device, most: int, slots: int, pages: int
    ) -> None:
        """For up to ``most`` rows of ``slots`` versions, with ``pages`` pages in total."""
        self._attention = attention
        self._slots = slots
        fields: dict[str, tuple[int, type[np.generic]]] = {
            "tokens": (most, np.int64),
            "positions": (most, np.int64),
            "drawn_rows": (most, np.int64),
            "where": (most, np.int64),
            "index": (most, np.int32),
            "starts": (slots + 1, np.int32),
            "slots": (slots, np.int32),
        }
        for name, size in attention.graph_inputs(most, pages + most).items():
            fields[name] = (size, np.int32)
        self._buffer = StepBuffer(fields, device)
        self.tensors = self._buffer.tensors
        """On the device; ``drawn_rows`` is -1 for known tokens."""

    def fill(self, batch: Batch, rows: int) -> list[int]:
        """Send the inputs of ``batch`` and plan its attention; returns the number of rows of each version.

        The batch is padded to ``rows`` with rows of the base that attend to one token.
        """
        arrays, count = self._buffer.arrays, batch.num_tokens
        idle = rows - count
        each = batch.chunks if count == len(batch.chunks) else single_tokens(batch.chunks)
        _, tokens, positions, tables, _, drawn_rows, _ = zip(*each, strict=True)
        starts, slots = batch.segments()
        arrays["tokens"][:count] = list(chain.from_iterable(tokens))
        arrays["positions"][:count] = positions
        arrays["tokens"][count:rows] = arrays["positions"][count:rows] = 0
        arrays["drawn_rows"][:count] = drawn_rows
        arrays["drawn_rows"][count:rows] = -1
        arrays["index"][:count] = np.repeat(np.array(slots) + 1, np.diff(starts))
        arrays["index"][count:rows] = 0
        if slots[0] < 0:  # rows of the base would only add idle programs and slow down the others
            starts, slots = starts[1:], slots[1:]
        arrays["starts"][:] = starts + [count] * (self._slots + 1 - len(starts))
        arrays["slots"][:] = slots + [-1] * (self._slots - len(slots))
        tables += (array("i", [self._attention.padding]),) * idle
        self._buffer.send(self._attention.fill(arrays["positions"][:rows], tables, arrays))
        return [stop - start for start, stop in pairwise(starts)]


def single_tokens(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Every token as a chunk of its own, in the same order."""
    return [
        chunk._replace(tokens=(token,), start=chunk.start + i)
        for chunk in chunks
        for i, token in enumerate(chunk.tokens)
    ]
