"""Deltas as a product of low rank and a sparse residue: a way of coding that the product does not have.

Both parts see the inputs: with L Lᵀ the damped Hessian of a linear, the product is the best of its rank for Δ L, whose
squared norm is the output error (as SVD-LLM, arXiv 2403.07378), and the residue keeps what weighs most in that norm.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from deltazip_ray.compress.blocks import BlockWeights, place_block, read_block
from deltazip_ray.compress.calibration import load_calibration
from deltazip_ray.compress.hessian import Hessian
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import load_tensor

ENTRY = 4
"""Bytes of one number of the residue: a bfloat16 and the number of its column."""
OVERSAMPLED, ITERATIONS = 16, 4
"""Of the randomized decomposition."""


def hessians(pair: Pair, options: CompressOptions) -> Iterator[tuple[list[str], BlockWeights, Tensor]]:
    """For linears that share their input: their names in the block, its weights, and the damped Hessian ``[K, K]``."""
    calibration = load_calibration(pair.finetuned, pair.skeleton, options, lambda fraction: None)
    runner = Runner(pair.skeleton, calibration, options)
    rows = load_tensor(pair.finetuned, pair.skeleton.embedding)[calibration.tokens]
    hidden = pair.skeleton.embed(runner.place(rows))
    for index in range(pair.skeleton.blocks):
        weights = read_block(pair, index, runner.mask.device)
        block = place_block(weights, pair.skeleton, runner)
        for stage in pair.skeleton.family.stages:
            names = [f"{linear}.weight" for linear in stage]
            hessian = Hessian(weights.base[weights.full(names[0])].shape[1], weights.device)
            runner.visit_inputs(block, stage[0], hidden[: runner.fitted], hessian.add)
            yield names, weights, hessian.damp(options.damping)
        hidden = runner.run(block, hidden)


def approximate(delta: Tensor, metric: Tensor, size: int, share: float) -> tuple[Tensor, int]:
    """What ``size`` bytes keep of ``delta`` ``[N, K]``, a ``share`` of them in the product; and the bytes it takes."""
    lower = torch.linalg.cholesky(metric.double()).float()
    rank = int(share * size / 2 / sum(delta.shape))
    up, values, down = torch.svd_lowrank(delta @ lower, min(rank + OVERSAMPLED, *delta.shape), ITERATIONS)
    factor = torch.linalg.solve_triangular(lower, down[:, :rank].T, upper=False, left=False)
    kept = (up[:, :rank] * values[:rank]).bfloat16().float() @ factor.bfloat16().float()
    count = int((1 - share) * size / ENTRY)
    residue = delta - kept
    saliency = residue.square() * metric.diagonal()
    chosen = saliency.flatten().topk(count).indices
    kept.flatten()[chosen] += residue.flatten()[chosen].bfloat16().float()
    return kept, 2 * rank * sum(delta.shape) + ENTRY * count
