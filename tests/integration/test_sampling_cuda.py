"""Sampling on a GPU: nothing waits, and a row draws the same in any batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from deltazip_ray.engine.sampling import Draw, SampledTokens, SamplingBatch, sample
from deltazip_ray.engine.sampling.draw import DrawState
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]
VOCAB = 128_256 + 7
ROWS = 48
KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=1.2, top_k=40, top_p=0.9, seed=2),
    SamplingParams(temperature=0.7, top_p=0.8, seed=3),
    SamplingParams(min_p=0.1, seed=4, logprobs=5),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((5, 4.0),), seed=5),
    SamplingParams(min_tokens=9, stop_token_ids=frozenset({7}), seed=6),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error for whatever makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_draws() -> list[Draw]:
    draws = []
    for row in range(ROWS):
        params = KINDS[row % len(KINDS)]
        history = [row, 5, 9, row + 70_000, 9]
        state = DrawState(GenerateRequest("r", None, tuple(history), params, output_offset=2))
        state.advance(history)
        draws.append(Draw.at(params, row % 5, state))
    return draws


def run(logits: torch.Tensor, draws: list[Draw]) -> SampledTokens:
    with torch.inference_mode(), no_waiting():
        return sample(logits.clone(), SamplingBatch.of(draws, logits.device))


def make_logits() -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_row_draws_the_same_alone_and_nothing_waits() -> None:
    logits, draws = make_logits(), make_draws()
    run(logits, draws)  # the first calls load kernels, which waits
    together = run(logits, draws).fetch().tokens
    assert min(together) >= 0
    for row in range(ROWS):
        alone = run(logits[row : row + 1], draws[row : row + 1]).fetch().tokens
        assert alone == [together[row]], KINDS[row % len(KINDS)]


def test_the_device_draws_as_the_host_does() -> None:
    logits, draws = make_logits(), make_draws()
    device = run(logits, draws).fetch().tokens
    host = sample(logits.cpu(), SamplingBatch.of(draws, torch.device("cpu"))).fetch().tokens
    # Exponentials differ in their last bit, so that a draw may rarely fall on the other side of a token's bound.
    assert sum(ours == theirs for ours, theirs in zip(device, host, strict=True)) >= ROWS - 1
