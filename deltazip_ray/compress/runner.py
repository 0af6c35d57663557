"""Runs one decoder block after another over the calibration sequences."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from deltazip_ray.compress.calibration import Calibration
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.skeleton import Skeleton

NUMBERS = 2**22
"""Of hidden states whose gradients go through a block at a time (1024 tokens of 4096): all that the block computes for
them is held."""
Watch = Callable[[str, Tensor, Tensor], None]
"""Is given a linear, its inputs ``[sequences, tokens, columns]`` and the gradient by its outputs, of some sequences."""


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
        # On the device first: a host takes long to convert a head.
        return tensor.to(self._device).to(self._dtype)

    def pinned(self, states: Tensor) -> Tensor:
        """``states`` on the host, in memory from which a GPU reads fast."""
        return states.pin_memory() if self._device.type == "cuda" else states

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Outputs of ``block`` for all sequences. They stay on the host, as ``hidden`` may: only a batch is placed."""
        found = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self._device.type == "cuda")
        for part, into in zip(torch.split(hidden, self._batch), torch.split(found, self._batch), strict=True):
            into.copy_(self._forward(block, part.to(self._device)))
        return found

    def visit_inputs(self, block: nn.Module, linear: str, hidden: Tensor, take: Callable[[Tensor], None]) -> None:
        """Give ``take`` the inputs ``[tokens, columns]`` of one linear of ``block``, padding left out.

        ``hidden`` are the states of the first sequences before the block.
        """

        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        handle = block.get_submodule(linear).register_forward_pre_hook(stop)
        try:
            for part, mask in self.batches(hidden):
                try:
                    self._forward(block, part)
                except _Reached as reached:
                    take(reached.inputs[mask])
        finally:
            handle.remove()

    def backward(
        self, block: nn.Module, linears: Sequence[str], hidden: Tensor, slopes: Tensor, watch: Watch
    ) -> Tensor:
        """Gradient by ``hidden``, the states of the first sequences before the block, from ``slopes``, that behind it.

        ``watch`` gets what goes through each of ``linears``, a batch of sequences at a time.
        """
        before = torch.empty_like(hidden, pin_memory=hidden.is_pinned())
        count = max(1, min(self._batch, NUMBERS // hidden[0].numel()))
        parts = (torch.split(tensor, count) for tensor in (hidden, slopes, before))
        for part, slope, into in zip(*parts, strict=True):
            into.copy_(self._back(block, linears, part.to(self._device), slope.to(self._device), watch))
        return before

    def _back(self, block: nn.Module, linears: Sequence[str], hidden: Tensor, slopes: Tensor, watch: Watch) -> Tensor:
        """:meth:`backward` of one batch, on the device: nothing of it is held when the next one begins."""
        passed: dict[str, tuple[Tensor, Tensor]] = {}
        # The other kernels add up gradients on a GPU in the order in which blocks of threads come.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _recorded(block, linears, passed):
            leaf = hidden.requires_grad_()
            outputs = self._forward(block, leaf)
        first, *others = torch.autograd.grad(outputs, [leaf, *(passed[linear][1] for linear in linears)], slopes)
        for linear, gradient in zip(linears, others, strict=True):
            watch(linear, passed[linear][0].detach(), gradient)
        return first

    def batches(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The states of the first sequences on the device with their masks, some sequences at a time."""
        masks = torch.split(self.mask[: len(hidden)], self._batch)
        for part, mask in zip(torch.split(hidden, self._batch), masks, strict=True):
            yield part.to(self._device), mask

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
