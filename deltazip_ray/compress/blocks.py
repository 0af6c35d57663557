"""Compresses one decoder block (the ΔCompress of DeltaZip, arXiv 2312.05215)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltazip_ray.artifact.manifest import TensorEntry
from deltazip_ray.compress.coding import Plan, code
from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.parts import Parts, rebuild
from deltazip_ray.compress.quality import relative
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import Skeleton, load_tensors
from deltazip_ray.compress.solver import Solver


@dataclass(frozen=True)
class States:
    """Hidden states ``[sequences, tokens, hidden]`` between two blocks; one object while nothing has changed."""

    finetuned: Tensor
    compressed: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """The weights of one block on both sides, in their dtypes as stored, on one device."""

    prefix: str
    base: dict[str, Tensor]
    """By full name, as ``finetuned``."""
    finetuned: dict[str, Tensor]
    changed: frozenset[str]
    """Names inside the block of the weights that differ."""

    def full(self, name: str) -> str:
        """The full name of ``name``."""
        return f"{self.prefix}.{name}"

    def delta(self, name: str) -> Tensor:
        """Fine-tune minus base of ``name``, float32."""
        full = self.full(name)
        return self.finetuned[full].float() - self.base[full].float()


def read_block(pair: Pair, index: int, device: torch.device) -> BlockWeights:
    """Load block ``index`` of both checkpoints to ``device``. Raises CheckpointInvalid."""
    prefix = pair.skeleton.block_name(index)
    names = pair.skeleton.block_weights(index)
    full = [f"{prefix}.{name}" for name in names]
    finetuned, base = load_tensors(pair.finetuned, full, device), load_tensors(pair.base, full, device)
    differs = (name for name in names if not same(base[f"{prefix}.{name}"], finetuned[f"{prefix}.{name}"]))
    return BlockWeights(prefix, base, finetuned, frozenset(differs))


def same(base: Tensor, finetuned: Tensor) -> bool:
    """Whether two weights are equal, whatever their dtypes."""
    return finetuned.equal(base) if finetuned.dtype == base.dtype else finetuned.float().equal(base.float())


def place_block(weights: BlockWeights, skeleton: Skeleton, runner: Runner) -> nn.Module:
    """The block of the fine-tune as a module."""
    start = len(weights.prefix) + 1
    placed = {name[start:]: runner.place(tensor) for name, tensor in weights.finetuned.items()}
    return skeleton.part(weights.prefix, placed)


class BlockCompressor:
    """Turns block after block into :class:`Parts`, and the states before a block into those after it."""

    def __init__(self, pair: Pair, runner: Runner, options: CompressOptions, plan: Plan) -> None:
        self._pair = pair
        self._runner = runner
        self._options = options
        self._plan = plan

    def compress(self, index: int, states: States) -> tuple[Parts, States]:
        """Code what block ``index`` changed. The inputs of its linears are those of the model compressed so far."""
        skeleton = self._pair.skeleton
        weights = read_block(self._pair, index, self._runner.mask.device)
        block = place_block(weights, skeleton, self._runner)
        reference = self._runner.run(block, states.finetuned)
        parts = Parts(self._pair.finetuned)
        left = set(weights.changed)
        for stage in skeleton.family.stages:
            linears = [linear for linear in stage if f"{linear}.weight" in weights.changed]
            if linears:
                self._stage(block, linears, weights, states.compressed, parts)
            left -= {f"{linear}.weight" for linear in stage}
        for name in sorted(left):
            parts.add_raw(weights.full(name), weights.finetuned[weights.full(name)])
        if not weights.changed and states.compressed is states.finetuned:
            return parts, States(reference, reference)
        return parts, States(reference, self._runner.run(block, states.compressed))

    def replay(
        self, index: int, states: States, entries: Mapping[str, TensorEntry], tensors: Mapping[str, Tensor]
    ) -> States:
        """The states behind block ``index``, which an earlier run has coded to ``entries`` and ``tensors``."""
        skeleton = self._pair.skeleton
        weights = read_block(self._pair, index, self._runner.mask.device)
        reference = self._runner.run(place_block(weights, skeleton, self._runner), states.finetuned)
        if not weights.changed and states.compressed is states.finetuned:
            return States(reference, reference)
        rebuilt = {
            name: self._runner.place(rebuild(weights.full(name), weights.base[weights.full(name)], entries, tensors))
            for name in skeleton.block_weights(index)
        }
        return States(reference, self._runner.run(skeleton.part(weights.prefix, rebuilt), states.compressed))

    def _stage(self, block: nn.Module, linears: list[str], weights: BlockWeights, hidden: Tensor, parts: Parts) -> None:
        """Code linears that share their input, and put their reconstruction into ``block`` for what follows."""
        full = {weights.full(f"{linear}.weight"): linear for linear in linears}
        hessian = Hessian(weights.base[next(iter(full))].shape[1], hidden.device)
        self._runner.visit_inputs(block, linears[0], hidden, hessian.add)
        hessian.check(weights.full(linears[0]))
        norms = {name: hessian.squared_norm(weights.finetuned[name].float()) for name in full}
        outcomes = code(
            {name: weights.delta(f"{linear}.weight") for name, linear in full.items()},
            self._plan,
            self._options.codec,
            lambda: Solver(hessian.damped(self._options.damping)).solve,
            lambda name, lost: relative(hessian.squared_norm(lost), norms[name]),
        )
        for name, linear in full.items():
            rebuilt = self._runner.place(weights.base[name].float() + outcomes[name].added)
            block.get_submodule(linear).weight = nn.Parameter(rebuilt, requires_grad=False)
            parts.add(name, outcomes[name], weights.finetuned[name])
