"""Small tensors between host and device, without waiting for either."""

from typing import Any

import torch
from numpy.typing import NDArray


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of ``values`` on ``device``; to a GPU by way of pinned memory, behind the work that is queued there."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


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
