"""Runs single decoder blocks over the calibration sequences."""

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
"""Elements of the hidden states in one backward pass (1024 tokens of 4096), which keeps the block's activations."""
Watch = Callable[[str, Tensor, Tensor], None]
"""Called for some sequences with a linear's name, its inputs ``[sequences, tokens, columns]`` and the gradient with
respect to its outputs."""


class _Reached(Exception):
    """Carries the inputs of a linear ``[sequences, tokens, columns]`` out of a block, whose rest need not run."""

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
        """A tensor on the device and in the dtype of the forward passes."""
        # Moved first: converting a head on the host is slow.
        return tensor.to(self._device).to(self._dtype)

    def pinned(self, states: Tensor) -> Tensor:
        """``states`` in page-locked memory if the device is a GPU."""
        return states.pin_memory() if self._device.type == "cuda" else states

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Outputs of ``block`` for all sequences, on the host. ``hidden`` may be there too: batches are moved."""
        found = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self._device.type == "cuda")
        for part, into in zip(torch.split(hidden, self._batch), torch.split(found, self._batch), strict=True):
            into.copy_(self._forward(block, part.to(self._device)))
        return found

    def visit_inputs(self, block: nn.Module, linear: str, hidden: Tensor, take: Callable[[Tensor], None]) -> None:
        """Call ``take`` with the inputs ``[tokens, columns]`` of one linear of ``block``, without padding.

        ``hidden`` are the states before the block, of the first sequences.
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
        """The gradient with respect to ``hidden``, the states before the block, given ``slopes``, the one after it.

        Both are of the first sequences. Calls ``watch`` for each of ``linears`` and each batch of sequences.
        """
        before = torch.empty_like(hidden, pin_memory=hidden.is_pinned())
        count = max(1, min(self._batch, NUMBERS // hidden[0].numel()))
        parts = (torch.split(tensor, count) for tensor in (hidden, slopes, before))
        for part, slope, into in zip(*parts, strict=True):
            into.copy_(self._back(block, linears, part.to(self._device), slope.to(self._device), watch))
        return before

    def _back(self, block: nn.Module, linears: Sequence[str], hidden: Tensor, slopes: Tensor, watch: Watch) -> Tensor:
        """:meth:`backward` of one batch, on the device; its activations are freed before the next one."""
        passed: dict[str, tuple[Tensor, Tensor]] = {}
        # The other kernels are not deterministic on a GPU: they add up gradients in the order in which blocks finish.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _recorded(block, linears, passed):
            leaf = hidden.requires_grad_()
            outputs = self._forward(block, leaf)
        first, *others = torch.autograd.grad(outputs, [leaf, *(passed[linear][1] for linear in linears)], slopes)
        for linear, gradient in zip(linears, others, strict=True):
            watch(linear, passed[linear][0].detach(), gradient)
        return first

    def batches(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the first sequences' states on the device, with their masks."""
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
    """While ``block`` runs, record the inputs and outputs of ``linears`` in ``passed``."""

    def keep(linear: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passed[linear] = (inputs[0], output)

    def hook(linear: str) -> RemovableHandle:
        return block.get_submodule(linear).register_forward_hook(lambda _, inputs, output: keep(linear, inputs, output))

    with ExitStack() as stack:
        for linear in linears:
            stack.callback(hook(linear).remove)
        yield
