"""What surrounds the decoder blocks: embedding, final norm and head."""

import torch
from torch import Tensor

from deltazip_kernels.layout import CODECS
from deltazip_ray.compress.blocks import States, same
from deltazip_ray.compress.calibration import Calibration
from deltazip_ray.compress.coding import Plan, code
from deltazip_ray.compress.grid import Coded
from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.options import Coding, CompressOptions
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.parts import ADDED, Parts, rebuild, rebuild_rows
from deltazip_ray.compress.quality import divergence, relative
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import load_tensor, load_tensors
from deltazip_ray.compress.solver import ROWS, Solver, round_to_nearest


class OuterCompressor:
    """Fills the parts of the ``outer`` blob: the embedding before the blocks, norm and head after them."""

    def __init__(self, pair: Pair, runner: Runner, options: CompressOptions, plan: Plan) -> None:
        self.parts = Parts(pair.finetuned)
        self._pair = pair
        self._runner = runner
        self._options = options
        self._plan = plan

    def embed(self, calibration: Calibration) -> States:
        """Code the embedding; returns the states before the first block.

        A lookup has no cross terms to compensate with, and any row may be looked up: rounded to nearest on the scales
        of least squared error. A tied head uses the same matrix.
        """
        name = self._pair.skeleton.embedding
        base, finetuned = load_tensor(self._pair.base, name), load_tensor(self._pair.finetuned, name)
        kept = finetuned[: base.shape[0]]
        changed = not same(base, kept)
        if changed:
            self._embedding(name, base, kept)
        self._add_rows(name, finetuned, base.shape[0])
        flat, where = torch.unique(calibration.tokens, return_inverse=True)
        embed = self._pair.skeleton.embed
        ours = embed(self._runner.place(finetuned[flat]))[where]
        if not changed and not self.parts.entries:
            return States(ours, ours)
        return States(ours, embed(self._runner.place(rebuild_rows(name, base, flat, self.parts)))[where])

    def finish(self, states: States) -> float:
        """Code norm and head; returns the mean KL(fine-tune ‖ reconstruction) per held-out token, in nats."""
        skeleton = self._pair.skeleton
        norms = load_tensors(self._pair.finetuned, skeleton.norms)
        for name, values in norms.items():
            if not same(load_tensor(self._pair.base, name), values):
                self.parts.add_raw(name, values)
        module = skeleton.final_norm({name: self._runner.place(values) for name, values in norms.items()})
        ours, theirs = module(states.finetuned), module(states.compressed)
        base, finetuned = load_tensor(self._pair.base, skeleton.head), load_tensor(self._pair.finetuned, skeleton.head)
        if not skeleton.tied:
            self._head(base, finetuned, theirs)
        place = self._runner.place
        placed = base.to(self._runner.mask.device)
        rebuilt = place(rebuild(skeleton.head, placed, self.parts.entries, self.parts.tensors))
        held_out = self._runner.mask[self._runner.fitted :]
        return divergence(
            ours[self._runner.fitted :][held_out],
            place(finetuned),
            theirs[self._runner.fitted :][held_out],
            rebuilt,
            skeleton.logits_softcap,
        )

    def _head(self, base: Tensor, finetuned: Tensor, inputs: Tensor) -> None:
        """Code an untied head, calibrated on the compressed model's final states."""
        name = self._pair.skeleton.head
        kept = finetuned[: base.shape[0]]
        if not same(base, kept):
            hessian = Hessian(base.shape[1], inputs.device)
            hessian.add(inputs[: self._runner.fitted][self._runner.mask[: self._runner.fitted]])
            hessian.check(name)
            target = kept.to(inputs.device).float()
            norm = hessian.squared_norm(target)
            outcomes = code(
                {name: target - base.to(inputs.device).float()},
                self._plan,
                self._options.outer_codec,
                lambda: Solver(hessian.damped(self._options.damping)).solve,
                lambda name, lost: relative(hessian.squared_norm(lost), norm),
            )
            self.parts.add(name, outcomes[name], kept)
        self._add_rows(name, finetuned, base.shape[0])

    def _embedding(self, name: str, base: Tensor, finetuned: Tensor) -> None:
        """Round the embedding's delta with the first codec of its ladder that is accurate enough."""
        ladder = self._plan.ladder(name, self._options.outer_codec)
        for step, coding in enumerate(ladder):
            coded, error = _nearest(base, finetuned, coding, self._runner.mask.device)
            if self._plan.accepts(error) or step == len(ladder) - 1:
                break
        if coding == "raw":
            self.parts.add_raw(name, finetuned)
        elif coded is not None:
            self.parts.add_coded(name, coded, coding, error)

    def _add_rows(self, name: str, finetuned: Tensor, start: int) -> None:
        if finetuned.shape[0] > start:
            self.parts.add_raw(name + ADDED, finetuned[start:])


def _nearest(base: Tensor, finetuned: Tensor, coding: Coding, device: torch.device) -> tuple[Coded | None, float]:
    """The rounded delta and its relative error, computed on ``device`` a bounded number of rows at a time."""
    if coding == "raw":
        return None, 0.0
    weights = torch.ones(base.shape[1], device=device)
    pieces, error, norm = [], torch.zeros((), device=device), torch.zeros((), device=device)
    for before, after in zip(torch.split(base, ROWS), torch.split(finetuned, ROWS), strict=True):
        after = after.to(device).float()
        lost = after - before.to(device).float()
        if coding != "absent":
            pieces.append(round_to_nearest(lost, weights, CODECS[coding]))
            lost = lost - pieces[-1].dequantized(CODECS[coding])
        error += lost.square().sum()
        norm += after.square().sum()
    return Coded.join(pieces) if pieces else None, relative(error, norm)
