"""Runs one decoder block after another over the calibration sequences."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltazip_ray.compress.calibration import Calibration
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.skeleton import Skeleton


@dataclass(frozen=True)
class Flow:
    """What went through a block forth and back."""

    slopes: Tensor
    """Gradient by the block's inputs ``[sequences, tokens, hidden]``."""
    inputs: dict[str, Tensor]
    """Of the first linear of each stage, ``[sequences, tokens, columns]``."""
    gradients: dict[str, Tensor]
    """By the outputs of each linear, ``[sequences, tokens, rows]``."""


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
        self._attention_mask = skeleton.attention_mask(self._positions.shape[1], self._dtype, self._device)

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

    def backward(self, block: nn.Module, stages: Sequence[Sequence[str]], hidden: Tensor, slopes: Tensor) -> Flow:
        """Gradients for the first sequences, whose states before the block are ``hidden``, from those behind it.

        ``stages`` are linears that share their inputs.
        """
        linears = [linear for stage in stages for linear in stage]
        firsts = [stage[0] for stage in stages if stage]
        before, inputs, gradients = [], defaultdict(list), defaultdict(list)
        for part, slope in zip(torch.split(hidden, self._batch), torch.split(slopes, self._batch), strict=True):
            passed: dict[str, tuple[Tensor, Tensor]] = {}
            with torch.enable_grad(), _recorded(block, linears, passed):
                leaf = part.detach().requires_grad_()
                outputs = self._forward(block, leaf)
            first, *others = torch.autograd.grad(outputs, [leaf, *(passed[linear][1] for linear in linears)], slope)
            before.append(first)
            for linear, gradient in zip(linears, others, strict=True):
                gradients[linear].append(gradient)
            for linear in firsts:
                inputs[linear].append(passed[linear][0].detach())
        return Flow(torch.cat(before), _joined(inputs), _joined(gradients))

    def _forward(self, block: nn.Module, hidden: Tensor) -> Tensor:
        output: Tensor = block(
            hidden,
            attention_mask=self._attention_mask,
            position_ids=self._positions,
            position_embeddings=self._rotary,
        )
        return output


@contextmanager
def _recorded(block: nn.Module, linears: Sequence[str], passed: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Keep inputs and outputs of ``linears`` in ``passed`` while the block runs."""

    def keep(linear: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passed[linear] = (inputs[0], output)

    def hook(linear: str) -> RemovableHandle:
        return block.get_submodule(linear).register_forward_hook(lambda _, inputs, output: keep(linear, inputs, output))

    with ExitStack() as stack:
        for linear in linears:
            stack.callback(hook(linear).remove)
        yield


def _joined(pieces: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(parts) for name, parts in pieces.items()}
