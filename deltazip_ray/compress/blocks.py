"""Compresses one decoder block (the ΔCompress of DeltaZip, arXiv 2312.05215)."""

from dataclasses import dataclass

import torch
from deltazip_kernels.layout import CODECS
from torch import Tensor, nn

from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.parts import Parts
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import load_tensors
from deltazip_ray.compress.solver import solve


@dataclass(frozen=True)
class States:
    """Hidden states ``[sequences, tokens, hidden]`` between two blocks; one object while nothing has changed."""

    finetuned: Tensor
    compressed: Tensor


class BlockCompressor:
    """Turns block after block into :class:`Parts`, and the states before a block into those after it."""

    def __init__(self, pair: Pair, runner: Runner, options: CompressOptions) -> None:
        self._pair = pair
        self._runner = runner
        self._options = options

    def compress(self, index: int, states: States) -> tuple[Parts, States]:
        """Code what block ``index`` changed. The inputs of its linears are those of the model compressed so far."""
        skeleton = self._pair.skeleton
        prefix = skeleton.block_name(index)
        names = {name: f"{prefix}.{name}" for name in skeleton.block_weights(index)}
        finetuned = load_tensors(self._pair.finetuned, names.values())
        base = load_tensors(self._pair.base, names.values())
        changed = {name for name, full in names.items() if not finetuned[full].float().equal(base[full].float())}
        block = skeleton.part(prefix, {name: self._runner.place(finetuned[full]) for name, full in names.items()})
        reference = self._runner.run(block, states.finetuned)
        parts = Parts()
        for stage in skeleton.family.stages:
            linears = [linear for linear in stage if f"{linear}.weight" in changed]
            if linears:
                self._stage(block, prefix, linears, base, finetuned, states.compressed, parts)
            changed -= {f"{linear}.weight" for linear in stage}
        for name in sorted(changed):
            parts.add_raw(names[name], finetuned[names[name]])
        if not parts.entries and states.compressed is states.finetuned:
            return parts, States(reference, reference)
        return parts, States(reference, self._runner.run(block, states.compressed))

    def _stage(
        self,
        block: nn.Module,
        prefix: str,
        linears: list[str],
        base: dict[str, Tensor],
        finetuned: dict[str, Tensor],
        hidden: Tensor,
        parts: Parts,
    ) -> None:
        """Code linears that share their input, and put their reconstruction into ``block`` for what follows."""
        names = [f"{prefix}.{linear}.weight" for linear in linears]
        hessian = Hessian(finetuned[names[0]].shape[1], hidden.device)
        self._runner.visit_inputs(block, linears[0], hidden, hessian.add)
        hessian.check(f"{prefix}.{linears[0]}")
        codec = CODECS[self._options.codec]
        old = [base[name].to(hidden.device).float() for name in names]
        new = [finetuned[name].to(hidden.device).float() for name in names]
        delta = torch.cat([after - before for before, after in zip(old, new, strict=True)])
        coded = solve(delta, hessian.damped(self._options.damping), codec)
        start = 0
        for linear, name, before, after in zip(linears, names, old, new, strict=True):
            piece = coded.rows(slice(start, start := start + before.shape[0]))
            rebuilt = before + piece.dequantized(codec)
            block.get_submodule(linear).weight = nn.Parameter(self._runner.place(rebuilt), requires_grad=False)
            error = relative(hessian.squared_norm(after - rebuilt), hessian.squared_norm(after))
            parts.add_coded(name, piece, self._options.codec, finetuned[name].nbytes, error)


def relative(squared_error: Tensor, squared_norm: Tensor) -> float:
    """Root of a ratio of squared norms; 0 when there is nothing to be relative to."""
    norm = float(squared_norm)
    # max keeps a first argument that is NaN, so that an overflow is seen.
    return max(float(squared_error) / norm, 0.0) ** 0.5 if norm != 0 else 0.0
