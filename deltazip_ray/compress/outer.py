"""Compresses what surrounds the decoder blocks: embedding, final norm and head."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltazip_ray.compress.adapter import LowRank
from deltazip_ray.compress.blocks import States, same
from deltazip_ray.compress.calibration import Calibration
from deltazip_ray.compress.coding import Encode, Plan, attempt
from deltazip_ray.compress.grid import Coded
from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.parts import ADDED, Parts, base_rows, rebuild_rows
from deltazip_ray.compress.quality import relative
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import load_tensor, load_tensors
from deltazip_ray.compress.solver import Solver, nearest
from deltazip_ray.compress.vocabulary import row_pieces


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

        A lookup has no cross terms to compensate with, and any row may be looked up, so values are rounded to nearest
        with the scales of least squared error. A tied head uses the same matrix.
        """
        name = self._pair.skeleton.embedding
        base, finetuned = load_tensor(self._pair.base, name), load_tensor(self._pair.finetuned, name)
        kept = finetuned[: base.shape[0]]
        changed = not same(base, kept)
        if changed:
            self._code(name, base, kept, nearest, lambda rows: rows.square().sum())
        self._add_rows(name, finetuned, base.shape[0])
        flat, where = torch.unique(calibration.tokens, return_inverse=True)

        def states(rows: Tensor, where: Tensor) -> Tensor:
            return self._pair.skeleton.embed(self._runner.place(rows))[where].cpu()

        ours = states(finetuned[flat], where)
        before = states(base_rows(base, finetuned, flat), where[calibration.fitted :])
        if not changed and not self.parts.entries:
            return States(ours, ours, before)
        return States(ours, states(rebuild_rows(name, base, flat, self.parts), where), before)

    def finish(self, states: States) -> None:
        """Code norm and head."""
        skeleton, runner = self._pair.skeleton, self._runner
        norms = load_tensors(self._pair.finetuned, skeleton.norms)
        for name, values in norms.items():
            if not same(load_tensor(self._pair.base, name), values):
                self.parts.add_raw(name, values)
        norm = skeleton.final_norm({name: runner.place(values) for name, values in norms.items()})
        base, finetuned = load_tensor(self._pair.base, skeleton.head), load_tensor(self._pair.finetuned, skeleton.head)
        if not skeleton.tied:
            if not same(base, finetuned[: len(base)]):
                self._head(base, finetuned[: len(base)], norm, states.compressed)
            self._add_rows(skeleton.head, finetuned, len(base))

    def _head(self, base: Tensor, finetuned: Tensor, norm: nn.Module, hidden: Tensor) -> None:
        """Code an untied head, calibrated on the final states of the compressed model."""
        name, device = self._pair.skeleton.head, self._runner.mask.device
        hessian = Hessian(base.shape[1], device)
        for part, mask in self._runner.batches(hidden[: self._runner.fitted]):
            hessian.add(norm(part)[mask])
        hessian.check(name)
        solver = Solver(hessian.damp(self._options.damping))
        self._code(name, base, finetuned, solver.solve, hessian.squared_norm)

    def _code(
        self, name: str, base: Tensor, finetuned: Tensor, encode: Encode, squared_norm: Callable[[Tensor], Tensor]
    ) -> None:
        """Code the rows that base and fine-tune have in common: as a product, or with the first codec that is accepted.

        Works on a piece of the rows at a time. ``squared_norm`` returns the squared norm of the outputs of some rows.
        """
        device = self._runner.mask.device
        product = self._plan.products.get(name)
        factors = None if product is None else product.stored(device)
        for coding in self._plan.ladder(name, self._options.outer_codec):
            pieces, lost, whole = [], 0.0, 0.0
            for rows in row_pieces(len(base)):
                target = finetuned[rows].to(device).float()
                delta = target - base[rows].to(device)
                if factors is not None:
                    coded, added = None, LowRank(factors.down, factors.up[rows]).product()
                else:
                    coded, added = attempt(delta, coding, encode)
                whole += float(squared_norm(target))
                lost += float(squared_norm(delta - added))
                pieces += [] if coded is None else [coded]
            error = relative(lost, whole)
            if self._plan.accepts(error):
                break
        if factors is not None:
            self.parts.add_factors(name, factors, error)
        elif coding == "raw":
            self.parts.add_raw(name, finetuned)
        elif pieces:
            self.parts.add_coded(name, Coded.join(pieces), coding, error)

    def _add_rows(self, name: str, finetuned: Tensor, start: int) -> None:
        if finetuned.shape[0] > start:
            self.parts.add_raw(name + ADDED, finetuned[start:])
