"""Compresses one decoder block (the ΔCompress of DeltaZip, arXiv 2312.05215)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deltazip_ray.artifact.manifest import TensorEntry
from deltazip_ray.compress.aside import aside
from deltazip_ray.compress.coding import Outcome, Plan, code
from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.parts import Parts, rebuild
from deltazip_ray.compress.quality import relative
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import Skeleton, check_tensor
from deltazip_ray.compress.solver import Solver


@dataclass(frozen=True)
class States:
    """Hidden states ``[sequences, tokens, hidden]`` between two blocks."""

    finetuned: Tensor
    compressed: Tensor
    """The same object as ``finetuned`` until the first change."""
    base: Tensor
    """Held-out sequences only, which the quality record needs."""


@dataclass(frozen=True)
class BlockWeights:
    """One block's weights of base and fine-tune, on the host and in their stored dtypes."""

    prefix: str
    base: dict[str, Tensor]
    """By full name, as ``finetuned``."""
    finetuned: dict[str, Tensor]
    changed: frozenset[str]
    """Names inside the block of the weights that differ."""
    device: torch.device

    def full(self, name: str) -> str:
        """The full name of a weight of the block."""
        return f"{self.prefix}.{name}"

    def placed(self, name: str) -> Tensor:
        """The fine-tune's weight, float32 on the device."""
        return self.finetuned[self.full(name)].to(self.device).float()

    def delta(self, name: str) -> Tensor:
        """Fine-tune minus base, float32 on the device."""
        return self.placed(name) - self.base[self.full(name)].to(self.device)


def read_block(pair: Pair, index: int, device: torch.device) -> BlockWeights:
    """Read block ``index`` of both checkpoints, and check it on ``device``. Raises CheckpointInvalid."""
    prefix = pair.skeleton.block_name(index)
    weights = BlockWeights(prefix, {}, {}, frozenset(), device)
    changed = set()
    for name in pair.skeleton.block_weights(index):
        full = weights.full(name)
        base, finetuned = pair.base.tensor(full), pair.finetuned.tensor(full)
        if not same(check_tensor(pair.base, full, base, device), check_tensor(pair.finetuned, full, finetuned, device)):
            changed.add(name)
        weights.base[full], weights.finetuned[full] = base, finetuned
    return replace(weights, changed=frozenset(changed))


def same(base: Tensor, finetuned: Tensor) -> bool:
    """Whether two weights are equal, whatever their dtypes."""
    return finetuned.equal(base) if finetuned.dtype == base.dtype else finetuned.float().equal(base.float())


def place_block(weights: BlockWeights, skeleton: Skeleton, runner: Runner) -> nn.Module:
    """The block of the fine-tune as a module on the runner's device."""
    return _module(weights.prefix, weights.finetuned, skeleton, runner)


def _module(prefix: str, weights: Mapping[str, Tensor], skeleton: Skeleton, runner: Runner) -> nn.Module:
    """A block with ``weights``, by full name, on the runner's device."""
    start = len(prefix) + 1
    return skeleton.part(prefix, {name[start:]: runner.place(tensor) for name, tensor in weights.items()})


class BlockCompressor:
    """Codes one block after another, and advances the calibration states through each."""

    def __init__(self, pair: Pair, runner: Runner, options: CompressOptions, plan: Plan) -> None:
        self._pair = pair
        self._runner = runner
        self._options = options
        self._plan = plan

    def compress(self, index: int, states: States) -> tuple[Parts, States]:
        """Code the changes of block ``index``, calibrated on the outputs of the compressed blocks before it."""
        skeleton = self._pair.skeleton
        weights = read_block(self._pair, index, self._runner.mask.device)
        base = self._behind_base(weights, states)
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
            return parts, States(reference, reference, base)
        return parts, States(reference, self._runner.run(block, states.compressed), base)

    def replay(
        self, index: int, states: States, entries: Mapping[str, TensorEntry], tensors: Mapping[str, Tensor]
    ) -> States:
        """The states after block ``index``, which an earlier run has coded as ``entries`` and ``tensors``."""
        skeleton = self._pair.skeleton
        weights = read_block(self._pair, index, self._runner.mask.device)
        base = self._behind_base(weights, states)
        reference = self._runner.run(place_block(weights, skeleton, self._runner), states.finetuned)
        if not weights.changed and states.compressed is states.finetuned:
            return States(reference, reference, base)
        rebuilt = {
            name: self._runner.place(
                rebuild(weights.full(name), weights.base[weights.full(name)].to(weights.device), entries, tensors)
            )
            for name in skeleton.block_weights(index)
        }
        return States(reference, self._runner.run(skeleton.part(weights.prefix, rebuilt), states.compressed), base)

    def _behind_base(self, weights: BlockWeights, states: States) -> Tensor:
        """The base's states after the block; its module is freed before the fine-tune's is placed."""
        return self._runner.run(_module(weights.prefix, weights.base, self._pair.skeleton, self._runner), states.base)

    def _stage(self, block: nn.Module, linears: list[str], weights: BlockWeights, hidden: Tensor, parts: Parts) -> None:
        """Code linears that share their input, and put their reconstructions into ``block`` for later stages."""
        first = f"{linears[0]}.weight"
        hessian = Hessian(weights.base[weights.full(first)].shape[1], weights.device)
        self._runner.visit_inputs(block, linears[0], hidden[: self._runner.fitted], hessian.add)
        hessian.check(weights.full(linears[0]))
        solver = Solver(hessian.damp(self._options.damping))
        rebuilt = {}
        with aside(*block.parameters()):
            for linear in linears:
                name = weights.full(f"{linear}.weight")
                outcome = self._code(f"{linear}.weight", weights, hessian, solver)
                parts.add(name, outcome, weights.finetuned[name])
                rebuilt[linear] = self._runner.place(outcome.added.add_(weights.base[name].to(weights.device)))
        for linear, weight in rebuilt.items():
            block.get_submodule(linear).weight = nn.Parameter(weight, requires_grad=False)

    def _code(self, name: str, weights: BlockWeights, hessian: Hessian, solver: Solver) -> Outcome:
        """Code the delta of one matrix."""
        norm = hessian.squared_norm(weights.placed(name))
        return code(
            weights.full(name),
            weights.delta(name),
            self._plan,
            self._options.codec,
            solver.solve,
            lambda delta, added: relative(hessian.squared_norm(delta, added), norm),
        )
