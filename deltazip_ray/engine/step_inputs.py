"""The inputs of a captured step: device memory at fixed places, filled by one copy."""

from collections.abc import Mapping

import numpy as np
import torch

from deltazip_ray.layers.staging import staged

_ALIGNMENT = 16


class StepBuffer:
    """Named arrays, one behind the other, on the host and at fixed addresses of the device."""

    def __init__(self, fields: Mapping[str, tuple[int, type[np.generic]]], device: torch.device) -> None:
        """``fields``: entries and type of each. The last is the one of which only a part may be sent."""
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
        """Copy everything, and of the last field ``last`` entries, behind what the device has yet to do."""
        start, size = self._last
        stop = start + last * size
        self._device[:stop].copy_(staged(self._host[:stop], self._device.device), non_blocking=True)
