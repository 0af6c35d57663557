"""Copies small tensors from the device to the host, waiting only for the work that computes them."""

from typing import Any

import torch


class Fetched:
    """Tensors being copied to the host. Create it right after launching their computation, read it when needed."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        """Start the copies."""
        self._event: torch.cuda.Event | None = None
        self._host = tensors
        if tensors[0].is_cuda:
            self._host = tuple(torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors)
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()

    def wait(self) -> list[list[Any]]:
        """The tensors as nested lists. Waits for the copies, but for nothing that was queued later."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._host]
