"""Batches small writes to device memory: one copy from the host for hundreds of writes."""

from collections.abc import Sequence

import torch

Values = torch.Tensor | Sequence[int]


class Writes:
    """The small writes of one load. Nothing is written before :meth:`send`."""

    def __init__(self) -> None:
        self._wanted: dict[int, tuple[torch.Tensor, Values]] = {}

    def put(self, target: torch.Tensor, values: Values) -> None:
        """Write ``values``, on the host or on the device of ``target``, to a contiguous ``target`` of as many numbers.

        :meth:`send` reads them. Of several writes to targets with the same address, only the last is made.
        """
        self._wanted[target.data_ptr()] = target, values

    def send(self) -> None:
        """Enqueue all writes on the current stream."""
        by_dtype: dict[torch.dtype, list[tuple[torch.Tensor, Values]]] = {}
        for target, values in self._wanted.values():
            by_dtype.setdefault(target.dtype, []).append((target, values))
        for writes in by_dtype.values():
            near = [(target, v) for target, v in writes if isinstance(v, torch.Tensor) and v.device == target.device]
            tensors = [(target, v) for target, v in writes if isinstance(v, torch.Tensor) and v.device != target.device]
            far = tensors + [(target, v) for target, v in writes if not isinstance(v, torch.Tensor)]
            near += zip((target for target, _ in far), _sent(far), strict=True)
            torch._foreach_copy_([target for target, _ in near], [v.view(target.shape) for target, v in near])
        self._wanted.clear()


def _sent(writes: Sequence[tuple[torch.Tensor, Values]]) -> Sequence[torch.Tensor]:
    """The values on the device of their targets, by one copy. All targets have one dtype; tensors come before lists."""
    if not writes:
        return []
    first = writes[0][0]
    tensors = [v.view(-1).to(first.dtype) for _, v in writes if isinstance(v, torch.Tensor)]
    numbers = [number for _, v in writes if not isinstance(v, torch.Tensor) for number in v]
    # Not page-locked, or it might wait for a copy engine that is busy with other loads (see staging.py).
    sent = torch.cat([*tensors, torch.tensor(numbers, dtype=first.dtype)]).to(first.device, non_blocking=True)
    pieces: Sequence[torch.Tensor] = sent.split([target.numel() for target, _ in writes])
    return pieces
