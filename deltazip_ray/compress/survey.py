"""What each coding would cost each matrix: the choices that bit allocation has.

The cost of an error E of a matrix is what it adds to KL(fine-tune ‖ reconstruction) per token, to second order: half
the mean square of ⟨Γ, E⟩, where Γ is the gradient, for one calibration sequence, of the log-likelihood of tokens drawn
from the fine-tune's own predictions. That is the Fisher information; SqueezeLLM (arXiv 2306.07629) weights single
weights by its diagonal; the errors here are neither small nor independent (at few bits they resemble the delta), so
all products count.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltazip_kernels.layout import Codec
from deltazip_ray.compress.blocks import BlockWeights, place_block, read_block, same
from deltazip_ray.compress.calibration import Calibration
from deltazip_ray.compress.choices import BLOB_HEADER, Survey, lost_by_coding
from deltazip_ray.compress.grid import Coded
from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.options import Coding, CompressOptions
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.parts import ADDED
from deltazip_ray.compress.quality import TOKENS as LOGITS
from deltazip_ray.compress.quality import divergence, logits
from deltazip_ray.compress.runner import Flow, Runner
from deltazip_ray.compress.skeleton import load_tensor, load_tensors
from deltazip_ray.compress.solver import Solver, round_to_nearest

TOKENS = 16384
"""Tokens, padding included, of the calibrated sequences that are looked at; bounds the memory for the states of all
blocks. Trial codes must not fit a few short chats: each needs several tokens for every column."""
FORWARD = 0.2
"""Share of the time that the pass forth takes, for progress."""


class Surveyor:
    """One pass over the fine-tune forth and one back, block by block."""

    def __init__(self, pair: Pair, runner: Runner, calibration: Calibration, options: CompressOptions) -> None:
        self._pair = pair
        self._runner = runner
        self._options = options
        count = min(calibration.fitted, -(-TOKENS // calibration.tokens.shape[1]))
        self._tokens = calibration.tokens[:count].to(runner.mask.device)
        self._mask = runner.mask[: len(self._tokens)]
        self._generator = torch.Generator(runner.mask.device).manual_seed(options.seed)
        self._survey = Survey(fixed=BLOB_HEADER * (pair.skeleton.blocks + 1))
        self._tied_costs: dict[Coding, float] = {}

    def survey(self, progress: Callable[[float], None]) -> Survey:
        """Measure everything; ``progress`` gets the fraction done. Raises CheckpointInvalid, CompressionError."""
        blocks = self._pair.skeleton.blocks
        skeleton = self._pair.skeleton
        rows = load_tensor(self._pair.finetuned, skeleton.embedding)[self._tokens.cpu()]
        # The states before every block wait on the host: they would fill a GPU.
        states = [skeleton.embed(self._runner.place(rows)).cpu()]
        for index in range(blocks):
            block = place_block(read_block(self._pair, index, self._mask.device), skeleton, self._runner)
            states.append(self._runner.run(block, self._runner.place(states[-1])).cpu())
            progress(FORWARD * (index + 1) / blocks)
        slopes = self._outer(self._runner.place(states.pop()))
        for index in reversed(range(blocks)):
            slopes = self._block(index, self._runner.place(states.pop()), slopes)
            progress(1 - (1 - FORWARD) * index / blocks)
        self._embedding(slopes)
        return self._survey

    def _block(self, index: int, hidden: Tensor, slopes: Tensor) -> Tensor:
        """Measure the linears of a block; returns the gradient by its inputs."""
        weights = read_block(self._pair, index, self._mask.device)
        block = place_block(weights, self._pair.skeleton, self._runner)
        products = {name: product for name, product in self._pair.products.items() if name in weights.finetuned}
        for name, product in products.items():
            self._survey.add_product(name, product)
        coded = {name for name in weights.changed if weights.full(name) not in products}
        stages = [
            [linear for linear in stage if f"{linear}.weight" in coded] for stage in self._pair.skeleton.family.stages
        ]
        flow = self._runner.backward(block, stages, hidden, slopes)
        for stage in stages:
            if stage:
                self._stage(stage, weights, flow)
        for name in sorted(coded - {f"{linear}.weight" for stage in stages for linear in stage}):
            self._survey.add_rest(weights.full(name), weights.finetuned[weights.full(name)])
        return flow.slopes

    def _stage(self, linears: Sequence[str], weights: BlockWeights, flow: Flow) -> None:
        """Try every coding on linears that share their input."""
        inputs = flow.inputs[linears[0]]
        hessian = Hessian(inputs.shape[2], inputs.device)
        batch = self._options.batch_sequences
        for part, mask in zip(torch.split(inputs, batch), torch.split(self._mask, batch), strict=True):
            hessian.add(part[mask])
        hessian.check(weights.full(linears[0]))
        deltas = {linear: weights.delta(f"{linear}.weight") for linear in linears}
        costs: dict[str, dict[Coding, float]] = {linear: {} for linear in linears}
        for coding, lost in lost_by_coding(deltas, Solver(hessian.damped(self._options.damping)).solve):
            for linear in linears:
                # Padding has no gradient, for nothing before it looks at it.
                parts = zip(torch.split(inputs, batch), torch.split(flow.gradients[linear], batch), strict=True)
                products = [
                    ((part.float() @ lost[linear].T) * gradient.float()).sum((1, 2)) for part, gradient in parts
                ]
                costs[linear][coding] = self._cost(torch.cat(products))
        for linear in linears:
            name = weights.full(f"{linear}.weight")
            self._survey.add(name, weights.finetuned[name], costs[linear])

    def _cost(self, products: Tensor) -> float:
        """The divergence per token that goes with products ⟨Γ, E⟩ of single sequences."""
        return float(products.square().sum()) / 2 / int(self._mask.sum())

    def _outer(self, hidden: Tensor) -> Tensor:
        """Measure an untied head and count the norm; returns the gradient by the last block's outputs."""
        skeleton = self._pair.skeleton
        norms = load_tensors(self._pair.finetuned, skeleton.norms)
        for name, values in norms.items():
            if not same(load_tensor(self._pair.base, name), values):
                self._survey.add_rest(name, values)
        module = skeleton.final_norm({name: self._runner.place(values) for name, values in norms.items()})
        head = load_tensor(self._pair.finetuned, skeleton.head)
        placed = self._runner.place(head)
        self._head(module(hidden)[self._mask], placed)
        few = max(1, LOGITS // hidden.shape[1])
        parts = zip(torch.split(hidden, few), torch.split(self._mask, few), strict=True)
        return torch.cat([self._slopes(module, part, mask, placed) for part, mask in parts])

    def _slopes(self, norm: torch.nn.Module, hidden: Tensor, mask: Tensor, head: Tensor) -> Tensor:
        """Gradient by ``hidden`` of the log-likelihood of tokens drawn from the model's own predictions."""
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            logs = logits(norm(leaf)[mask], head, self._pair.skeleton.logits_softcap).log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=self._generator)
            (slopes,) = torch.autograd.grad(logs.gather(1, drawn).sum(), leaf)
        return slopes

    def _head(self, states: Tensor, placed: Tensor) -> None:
        """Measure what each coding of the head adds to the divergence, all else being the fine-tune's own."""
        name = self._pair.skeleton.head
        base, finetuned = load_tensor(self._pair.base, name), load_tensor(self._pair.finetuned, name)
        kept = finetuned[: len(base)]
        if same(base, kept):
            return
        if name in self._pair.products:
            self._survey.add_product(name, self._pair.products[name])
            return
        hessian = Hessian(base.shape[1], states.device)
        hessian.add(states)
        hessian.check(name)
        tied = self._pair.skeleton.tied
        encode = nearest if tied else Solver(hessian.damped(self._options.damping)).solve
        delta = kept.to(states.device).float() - base.to(states.device).float()
        costs = {}
        for coding, lost in lost_by_coding({name: delta}, encode):
            rebuilt = placed.clone()
            rebuilt[: len(base)] -= lost[name]
            costs[coding] = divergence(states, placed, states, rebuilt, self._pair.skeleton.logits_softcap)
        if tied:
            self._tied_costs = costs
        else:
            self._survey.add(name, kept, costs)

    def _embedding(self, slopes: Tensor) -> None:
        """Measure the lookups by the gradient by the first block's inputs; a tied head's costs come on top."""
        name = self._pair.skeleton.embedding
        base, finetuned = load_tensor(self._pair.base, name), load_tensor(self._pair.finetuned, name)
        self._survey.add_rest(name + ADDED, finetuned[len(base) :])
        if not self._pair.skeleton.tied:
            head = self._pair.skeleton.head
            self._survey.add_rest(head + ADDED, load_tensor(self._pair.finetuned, head)[len(base) :])
        kept = finetuned[: len(base)]
        if same(base, kept):
            return
        known = self._mask & (self._tokens < len(base))
        sequences = torch.arange(len(self._tokens), device=known.device)[:, None].expand_as(known)
        seen, row = torch.unique(self._tokens[known], return_inverse=True)
        delta = (kept[seen.cpu()].float() - base[seen.cpu()].float()).to(slopes.device)
        gradient = slopes[known].float() * self._pair.skeleton.embedding_scale
        costs = {}
        for coding, lost in lost_by_coding({name: delta}, nearest):
            products = gradient.new_zeros(len(self._tokens))
            products.index_add_(0, sequences[known], (gradient * lost[name][row]).sum(1))
            costs[coding] = self._cost(products) + self._tied_costs.get(coding, 0.0)
        self._survey.add(name, kept, costs)


def nearest(delta: Tensor, codec: Codec) -> Coded:
    """An :data:`Encode` for lookups, which have no cross terms to compensate with."""
    return round_to_nearest(delta, torch.ones(delta.shape[1], device=delta.device), codec)
