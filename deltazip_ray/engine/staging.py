"""Small tensors from the device to the host, without waiting for more than what makes them."""

from typing import Any

import torch


class Fetched:
    """Tensors on their way to the host. Made behind the work that computes them, read when somebody needs them."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        """Start to copy."""
        self._event: torch.cuda.Event | None = None
        self._host = tensors
        if tensors[0].is_cuda:
            self._host = tuple(torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors)
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()

    def wait(self) -> list[list[Any]]:
        """Each tensor as nested lists, once it is here; waits for nothing that was queued later."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._host]
