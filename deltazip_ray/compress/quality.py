"""How far a reconstruction is from its fine-tune."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear

TOKENS = 512
"""Tokens whose logits are held at once."""


def relative(squared_error: Tensor, squared_norm: Tensor) -> float:
    """Root of a ratio of squared norms; 0 when there is nothing to be relative to."""
    norm = float(squared_norm)
    # max keeps a first argument that is NaN, so that an overflow is seen.
    return max(float(squared_error) / norm, 0.0) ** 0.5 if norm != 0 else 0.0


def logits(states: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """Float32 ``[tokens, vocab]`` of final states ``[tokens, hidden]``."""
    found = linear(states, head).float()
    return found if softcap is None else softcap * torch.tanh(found / softcap)


def divergence(
    ours: Tensor, our_head: Tensor, theirs: Tensor, their_head: Tensor, softcap: float | None = None
) -> float:
    """Mean KL per row between the softmaxes of two models' logits, in nats; states are ``[tokens, hidden]``."""
    total = 0.0
    for mine, other in zip(torch.split(ours, TOKENS), torch.split(theirs, TOKENS), strict=True):
        target = logits(mine, our_head, softcap).log_softmax(-1)
        guess = logits(other, their_head, softcap).log_softmax(-1)
        total += float(kl_div(guess, target, reduction="sum", log_target=True))
    # Rounding may leave a hair below zero where the models agree; max keeps a first argument that is NaN.
    return max(total / ours.shape[0], 0.0)
