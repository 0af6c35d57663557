"""Estimates what each coding of each matrix costs: the choices of bit allocation.

The cost of an error E of a matrix is what it adds to KL(fine-tune ‖ reconstruction) per token, to second order: half
the mean square of ⟨Γ, E⟩, where Γ is the gradient, for one calibration sequence, of the log-likelihood of tokens
sampled from the fine-tune's own predictions. This is the Fisher information. SqueezeLLM (arXiv 2306.07629) weights
single weights by its diagonal; here errors are neither small nor independent (at few bits they resemble the delta), so
all products are kept.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from deltazip_ray.compress.aside import aside
from deltazip_ray.compress.blocks import BlockWeights, place_block, read_block, same
from deltazip_ray.compress.calibration import Calibration
from deltazip_ray.compress.choices import BLOB_HEADER, Survey
from deltazip_ray.compress.coding import Encode
from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.options import Coding, CompressOptions
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.parts import ADDED
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import load_tensor, load_tensors
from deltazip_ray.compress.solver import Solver, nearest
from deltazip_ray.compress.trials import TRIED, Trials
from deltazip_ray.compress.vocabulary import Divergence, row_pieces, sampled_slopes

TOKENS = 16384
"""Tokens used, padding included, which limits the memory for the states of all blocks. Enough for several tokens per
column, as trial codes must not overfit a few short chats."""
FORWARD = 0.05
"""For progress: the share of the time that the forward pass takes."""


class Surveyor:
    """One forward and one backward pass over the fine-tune, block by block."""

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
        states = self._forth(lambda done: progress(FORWARD * done))
        slopes = self._outer(states.pop())
        for index in reversed(range(blocks)):
            slopes = self._block(index, self._runner.pinned(states.pop()), slopes)
            progress(1 - (1 - FORWARD) * index / blocks)
        self._embedding(slopes)
        return self._survey

    def _forth(self, progress: Callable[[float], None]) -> list[Tensor]:
        """The states before every block and after the last one, on the host in pageable memory."""
        skeleton = self._pair.skeleton
        rows = load_tensor(self._pair.finetuned, skeleton.embedding)[self._tokens.cpu()]
        states = [skeleton.embed(self._runner.place(rows)).cpu()]
        for index in range(skeleton.blocks):
            weights = read_block(self._pair, index, self._mask.device)
            # Not bound to a name, so that it is freed before the next block is placed.
            states.append(self._runner.run(place_block(weights, skeleton, self._runner), states[-1]).clone())
            progress((index + 1) / skeleton.blocks)
        return states

    def _block(self, index: int, hidden: Tensor, slopes: Tensor) -> Tensor:
        """Measure the linears of a block; returns the gradient with respect to its inputs."""
        weights = read_block(self._pair, index, self._mask.device)
        block = place_block(weights, self._pair.skeleton, self._runner)
        products = {name: product for name, product in self._pair.products.items() if name in weights.finetuned}
        for name, product in products.items():
            self._survey.add_product(name, product)
        coded = {name for name in weights.changed if weights.full(name) not in products}
        before = None
        for stage in self._pair.skeleton.family.stages:
            linears = [linear for linear in stage if f"{linear}.weight" in coded]
            if linears:
                before = self._stage(block, linears, weights, hidden, slopes)
            coded -= {f"{linear}.weight" for linear in stage}
        for name in sorted(coded):
            self._survey.add_rest(weights.full(name), weights.finetuned[weights.full(name)])
        return self._runner.backward(block, [], hidden, slopes, lambda *_: None) if before is None else before

    def _stage(
        self, block: nn.Module, linears: Sequence[str], weights: BlockWeights, hidden: Tensor, slopes: Tensor
    ) -> Tensor:
        """Try every coding on linears that share their input; returns the gradient with respect to the block's inputs.

        Each stage has a backward pass of its own, so that only its deltas are in memory beside the activations.
        """
        trials = self._trials(block, linears, weights, hidden)

        def watch(linear: str, inputs: Tensor, gradient: Tensor) -> None:
            # Padding has no gradient: no other token attends to it.
            trials[linear].add(inputs.float(), gradient.float())

        before = self._runner.backward(block, linears, hidden, slopes, watch)
        for linear in linears:
            name = weights.full(f"{linear}.weight")
            costs = {coding: self._cost(found) for coding, found in trials[linear].products.items()}
            self._survey.add(name, weights.finetuned[name], costs)
        return before

    def _trials(
        self, block: nn.Module, linears: Sequence[str], weights: BlockWeights, hidden: Tensor
    ) -> dict[str, Trials]:
        """Code the deltas of linears that share their input in every way."""
        columns = weights.base[weights.full(f"{linears[0]}.weight")].shape[1]
        hessian = Hessian(columns, self._mask.device)
        self._runner.visit_inputs(block, linears[0], hidden, hessian.add)
        hessian.check(weights.full(linears[0]))
        solver = Solver(hessian.damp(self._options.damping))
        with aside(*block.parameters()):
            return {linear: Trials(weights.delta(f"{linear}.weight"), solver.solve) for linear in linears}

    def _cost(self, products: Tensor) -> float:
        """The divergence per token from the products ⟨Γ, E⟩ of single sequences."""
        return float(products.square().sum()) / 2 / int(self._mask.sum())

    def _outer(self, hidden: Tensor) -> Tensor:
        """Measure an untied head, count the norm; returns the gradient with respect to the last outputs ``hidden``."""
        skeleton = self._pair.skeleton
        norms = load_tensors(self._pair.finetuned, skeleton.norms)
        for name, values in norms.items():
            if not same(load_tensor(self._pair.base, name), values):
                self._survey.add_rest(name, values)
        module = skeleton.final_norm({name: self._runner.place(values) for name, values in norms.items()})
        states = torch.cat([module(part)[mask] for part, mask in self._runner.batches(hidden)])
        self._head(states)
        head = load_tensor(self._pair.finetuned, skeleton.head)

        def pieces() -> Iterator[Tensor]:
            return (self._runner.place(head[rows]) for rows in row_pieces(len(head)))

        gradient = sampled_slopes(states, pieces, self._generator, skeleton.logits_softcap)
        return self._through(module, hidden, gradient)

    def _through(self, norm: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Backpropagate ``gradient``, of the norm's outputs for unpadded tokens, to ``hidden``. On the host."""
        slopes, start = [], 0
        for part, mask in self._runner.batches(hidden):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                outputs = norm(leaf)[mask]
            end = start + len(outputs)
            slopes.append(torch.autograd.grad(outputs, leaf, gradient[start:end])[0].cpu())
            start = end
        return torch.cat(slopes)

    def _head(self, states: Tensor) -> None:
        """Measure what each coding of the head adds to the divergence if nothing else is compressed."""
        name = self._pair.skeleton.head
        base, finetuned = load_tensor(self._pair.base, name), load_tensor(self._pair.finetuned, name)
        kept = finetuned[: len(base)]
        if same(base, kept):
            return
        if name in self._pair.products:
            self._survey.add_product(name, self._pair.products[name])
            return
        tied = self._pair.skeleton.tied
        costs = self._divergences(states, base, finetuned, nearest if tied else self._solver(name, states).solve)
        if tied:
            self._tied_costs = costs
        else:
            self._survey.add(name, kept, costs)

    def _solver(self, name: str, states: Tensor) -> Solver:
        hessian = Hessian(states.shape[1], states.device)
        hessian.add(states)
        hessian.check(name)
        return Solver(hessian.damp(self._options.damping))

    def _divergences(self, states: Tensor, base: Tensor, finetuned: Tensor, encode: Encode) -> dict[Coding, float]:
        """The divergence between the head ``finetuned`` and each coding of it; added rows are unchanged."""
        found = {coding: Divergence(len(states), states.device, self._pair.skeleton.logits_softcap) for coding in TRIED}
        for rows in row_pieces(len(base)):
            placed = self._runner.place(finetuned[rows])
            delta = finetuned[rows].to(placed.device).float() - base[rows].to(placed.device)
            for coding, lost in Trials(delta, encode).lost.items():
                found[coding].add(states, placed, states, (placed - lost).to(placed.dtype))
        for rows in row_pieces(len(finetuned) - len(base)):
            added = self._runner.place(finetuned[len(base) :][rows])
            for divergence in found.values():
                divergence.add(states, added, states, added)
        return {coding: divergence.mean() for coding, divergence in found.items()}

    def _embedding(self, slopes: Tensor) -> None:
        """Measure the embedding by the gradient of the first block's inputs; the costs of a tied head are added."""
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
        seen, row = torch.unique(self._tokens[known], return_inverse=True)
        delta = (kept[seen.cpu()].float() - base[seen.cpu()].float()).to(known.device)
        gradient = slopes.to(known.device)[known].float() * self._pair.skeleton.embedding_scale
        costs = {}
        for coding, lost in Trials(delta, nearest).lost.items():
            products = gradient.new_zeros(known.shape)
            products[known] = (gradient * lost[row]).sum(1)
            costs[coding] = self._cost(products.sum(1)) + self._tied_costs.get(coding, 0.0)
        self._survey.add(name, kept, costs)
