"""What surrounds the decoder blocks: embedding, final norm and head."""

import torch
from deltazip_kernels.layout import CODECS
from torch import Tensor
from torch.nn.functional import kl_div, linear

from deltazip_ray.compress.blocks import States, relative
from deltazip_ray.compress.calibration import Calibration
from deltazip_ray.compress.grid import Coded, round_to_nearest
from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.parts import ADDED, Parts, rebuild, rebuild_rows
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import load_tensor
from deltazip_ray.compress.solver import ROWS, solve

TOKENS = 512
"""Tokens whose logits are held at once."""


class OuterCompressor:
    """Fills the parts of the ``outer`` blob: the embedding before the blocks, norm and head after them."""

    def __init__(self, pair: Pair, runner: Runner, options: CompressOptions) -> None:
        self.parts = Parts()
        self._pair = pair
        self._runner = runner
        self._options = options

    def embed(self, calibration: Calibration) -> States:
        """Code the embedding; returns the states before the first block.

        A lookup has no cross terms to compensate with, and any row may be looked up: rounded to nearest on the scales
        of least squared error. A tied head uses the same matrix.
        """
        name = self._pair.skeleton.embedding
        base, finetuned = load_tensor(self._pair.base, name), load_tensor(self._pair.finetuned, name)
        kept = finetuned[: base.shape[0]]
        if not kept.float().equal(base.float()):
            coded, error = self._nearest(base, kept)
            self.parts.add_coded(name, coded, self._options.outer_codec, kept.nbytes, error)
        self._add_rows(name, finetuned, base.shape[0])
        flat, where = torch.unique(calibration.tokens, return_inverse=True)
        ours = self._runner.place(finetuned[flat])[where]
        if not self.parts.entries:
            return States(ours, ours)
        return States(ours, self._runner.place(rebuild_rows(name, base, flat, self.parts))[where])

    def finish(self, states: States) -> float:
        """Code norm and head; returns the mean KL(fine-tune ‖ reconstruction) per held-out token, in nats."""
        skeleton = self._pair.skeleton
        norm = load_tensor(self._pair.finetuned, skeleton.norm)
        if not norm.float().equal(load_tensor(self._pair.base, skeleton.norm).float()):
            self.parts.add_raw(skeleton.norm, norm)
        module = skeleton.part(skeleton.family.norm, {"weight": self._runner.place(norm)})
        ours, theirs = module(states.finetuned), module(states.compressed)
        base, finetuned = load_tensor(self._pair.base, skeleton.head), load_tensor(self._pair.finetuned, skeleton.head)
        if not skeleton.tied:
            self._head(base, finetuned, theirs)
        place = self._runner.place
        rebuilt = place(rebuild(skeleton.head, base, self.parts.entries, self.parts.tensors))
        held_out = self._runner.mask[self._runner.fitted :]
        return _divergence(
            ours[self._runner.fitted :][held_out], place(finetuned), theirs[self._runner.fitted :][held_out], rebuilt
        )

    def _head(self, base: Tensor, finetuned: Tensor, inputs: Tensor) -> None:
        """Code an untied head, calibrated on the compressed model's final states."""
        name = self._pair.skeleton.head
        kept = finetuned[: base.shape[0]]
        if not kept.float().equal(base.float()):
            hessian = Hessian(base.shape[1], inputs.device)
            hessian.add(inputs[: self._runner.fitted][self._runner.mask[: self._runner.fitted]])
            hessian.check(name)
            codec = CODECS[self._options.outer_codec]
            target = kept.to(inputs.device).float()
            delta = target - base.to(inputs.device).float()
            coded = solve(delta, hessian.damped(self._options.damping), codec)
            error = relative(hessian.squared_norm(delta - coded.dequantized(codec)), hessian.squared_norm(target))
            self.parts.add_coded(name, coded, self._options.outer_codec, kept.nbytes, error)
        self._add_rows(name, finetuned, base.shape[0])

    def _nearest(self, base: Tensor, finetuned: Tensor) -> tuple[Coded, float]:
        """The rounded delta and its relative error, a bounded number of rows at a time."""
        codec = CODECS[self._options.outer_codec]
        weights = torch.ones(base.shape[1])
        pieces, error, norm = [], torch.zeros(()), torch.zeros(())
        for before, after in zip(torch.split(base, ROWS), torch.split(finetuned, ROWS), strict=True):
            delta = after.float() - before.float()
            pieces.append(round_to_nearest(delta, weights, codec))
            error += (delta - pieces[-1].dequantized(codec)).square().sum()
            norm += after.float().square().sum()
        return Coded.join(pieces), relative(error, norm)

    def _add_rows(self, name: str, finetuned: Tensor, start: int) -> None:
        if finetuned.shape[0] > start:
            self.parts.add_raw(name + ADDED, finetuned[start:])


def _divergence(ours: Tensor, our_head: Tensor, theirs: Tensor, their_head: Tensor) -> float:
    """Mean KL per row between the softmaxes of two models' logits; states are ``[tokens, hidden]``."""
    total = 0.0
    for mine, other in zip(torch.split(ours, TOKENS), torch.split(theirs, TOKENS), strict=True):
        target = linear(mine, our_head).float().log_softmax(-1)
        guess = linear(other, their_head).float().log_softmax(-1)
        total += float(kl_div(guess, target, reduction="sum", log_target=True))
    # Rounding may leave a hair below zero where the models agree; max keeps a first argument that is NaN.
    return max(total / ours.shape[0], 0.0)
