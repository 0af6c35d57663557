"""Runs one decoder block after another over the calibration sequences."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltazip_ray.compress.calibration import Calibration
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.skeleton import Skeleton


class _Reached(Exception):
    """The linear of interest has its inputs ``[sequences, tokens, columns]``: the rest of the block need not run."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__(inputs)
        self.inputs = inputs


class Runner:
    """Forward passes of single blocks over ``[sequences, tokens, hidden]``, a few sequences at a time."""

    def __init__(self, skeleton: Skeleton, calibration: Calibration, options: CompressOptions) -> None:
        self._device = torch.device(options.device)
        self._dtype = options.torch_dtype
        self._batch = options.batch_sequences
        self.mask = calibration.mask.to(self._device)
        self.fitted = calibration.fitted
        self._positions = torch.arange(calibration.tokens.shape[1], device=self._device)[None]
        probe = torch.empty(0, device=self._device, dtype=self._dtype)
        self._rotary: tuple[Tensor, Tensor] = skeleton.rotary(self._device)(probe, self._positions)

    def place(self, tensor: Tensor) -> Tensor:
        """A weight as the forward passes want it: their device and dtype."""
        return tensor.to(self._device, self._dtype)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Outputs of ``block`` for all sequences."""
        return torch.cat([self._forward(block, part) for part in torch.split(hidden, self._batch)])

    def visit_inputs(self, block: nn.Module, linear: str, hidden: Tensor, take: Callable[[Tensor], None]) -> None:
        """Give ``take`` the inputs ``[tokens, columns]`` of one linear of ``block``, over the calibrated sequences."""

        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        handle = block.get_submodule(linear).register_forward_pre_hook(stop)
        masks = torch.split(self.mask[: self.fitted], self._batch)
        try:
            for part, mask in zip(torch.split(hidden[: self.fitted], self._batch), masks, strict=True):
                try:
                    self._forward(block, part)
                except _Reached as reached:
                    take(reached.inputs[mask])
        finally:
            handle.remove()

    def _forward(self, block: nn.Module, hidden: Tensor) -> Tensor:
        output: Tensor = block(
            hidden, attention_mask=None, position_ids=self._positions, position_embeddings=self._rotary
        )
        return output
