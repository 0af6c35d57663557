"""Drawing tokens: distribution, filters, and that a draw depends on its own row, seed and position alone."""

from collections import Counter

import numpy as np
import pytest
import torch

from deltazip_ray.engine.sampling import Draw, SamplingBatch, StepDraws
from deltazip_ray.engine.sampling import sample as sample_batch
from deltazip_ray.engine.sampling.random_rows import uniform
from deltazip_ray.scheduler.batch import NOT_FINITE, Batch, Chunk
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams
from deltazip_ray.scheduler.sequence import SequenceState

DRAWS = 20_000


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[int | None]:
    """The tokens of one batch."""
    drawn = sample_batch(logits.clone(), SamplingBatch.of(draws, logits.device)).fetch()
    return [None if token == NOT_FINITE else token for token in drawn.tokens]


def frequencies(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """How often each token comes when ``logits`` ``[vocab]`` are drawn from at many positions."""
    drawn = sample(logits.expand(DRAWS, -1), [Draw.at(params, position) for position in range(DRAWS)])
    counts = Counter(drawn)
    return torch.tensor([counts[token] / DRAWS for token in range(len(logits))], dtype=torch.float64)


def random_logits(rows: int, vocab: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability(temperature: float) -> None:
    logits = random_logits(1)[0]
    expected = (logits.double() / temperature).softmax(-1)
    found = frequencies(logits, SamplingParams(temperature=temperature, seed=3))
    # Five standard deviations of a binomial frequency.
    assert (found - expected).abs().le(5 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-9).all()


def test_top_k_keeps_the_k_best_and_their_proportions() -> None:
    logits = random_logits(1, seed=1)[0]
    best = logits.topk(5).indices
    expected = torch.zeros(len(logits), dtype=torch.float64)
    expected[best] = logits[best].double().softmax(-1)
    found = frequencies(logits, SamplingParams(top_k=5, seed=4))
    assert set(found.nonzero()[:, 0].tolist()) == set(best.tolist())
    assert (found - expected).abs().max() < 0.02


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(top_p: float) -> None:
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()[[2, 0, 4, 1, 3]]
    kept = {0.05: [0.4], 0.5: [0.4, 0.3], 0.9: [0.4, 0.3, 0.15, 0.1]}[top_p]
    found = frequencies(logits, SamplingParams(top_p=top_p, seed=5))
    expected = sorted((value / sum(kept) for value in kept), reverse=True)
    assert found.sort(descending=True).values[: len(kept)].tolist() == pytest.approx(expected, abs=0.02)
    assert int((found > 0).sum()) == len(kept)


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two best, the first has 4/7, which is enough for p = 0.5, though 0.4 is not.
    found = frequencies(logits, SamplingParams(top_k=2, top_p=0.5))
    assert found.tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1e-30),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(temperature=0.0, top_k=7, top_p=0.3, seed=9),
    ],
)
def test_what_leaves_one_token_is_greedy(params: SamplingParams) -> None:
    logits = random_logits(64, seed=2)
    assert sample(logits, [Draw.at(params, i) for i in range(64)]) == logits.argmax(-1).tolist()


def test_a_row_draws_the_same_whatever_shares_the_batch() -> None:
    logits = random_logits(40, vocab=96, seed=3)
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(temperature=0.7, top_k=8, seed=2),
        SamplingParams(temperature=1.3, top_p=0.8, seed=3),
    ]
    draws = [Draw.at(kinds[i % 4], i) for i in range(40)]
    together = sample(logits, draws)
    assert together == [sample(logits[i : i + 1], draws[i : i + 1])[0] for i in range(40)]
    padded = torch.cat([logits, torch.full((40, 5), -torch.inf)], dim=1)
    assert together == sample(padded, draws)


def test_the_seed_and_the_position_decide() -> None:
    logits = torch.zeros(200, 1000)

    def draw(seed: int, first: int) -> list[int | None]:
        return sample(logits, [Draw.at(SamplingParams(seed=seed), first + i) for i in range(200)])

    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 0)[50:] == draw(1, 50)[:150]
    assert sum(a == b for a, b in zip(draw(1, 0), draw(2, 0), strict=True)) < 5
    assert len(set(draw(1, 0))) > 150


def test_uniform_numbers_are_below_one_for_any_seed() -> None:
    seeds = np.array([0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1], dtype=np.uint64)
    numbers = uniform(np.repeat(seeds, 2000), np.tile(np.arange(2000), 5))
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert numbers.mean() == pytest.approx(0.5, abs=0.02)
    # As splitmix64's own: the draws of a seed stay what they were.
    assert uniform(np.array([11], dtype=np.uint64), np.array([7]))[0] == 0.5996416090289216


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_p=0.5)])
def test_only_the_row_that_is_not_finite_is_refused(broken: float, params: SamplingParams) -> None:
    logits = random_logits(3, seed=4)
    alone = sample(logits, [Draw.at(params, i) for i in range(3)])
    logits[1, 7] = broken
    assert sample(logits, [Draw.at(params, i) for i in range(3)]) == [alone[0], None, alone[2]]


def test_draws_of_steps_are_those_of_each_step_alone() -> None:
    kinds = [
        SamplingParams(seed=-1),
        SamplingParams(seed=2, top_p=0.8),
        SamplingParams(temperature=0.0),
        SamplingParams(seed=3, min_p=0.05, temperature=0.7),
        SamplingParams(seed=4, repetition_penalty=1.3),
        SamplingParams(seed=5, top_k=5, logprobs=2),
    ]
    sequences = [SequenceState(GenerateRequest(str(i), None, (1, 2), params), -1) for i, params in enumerate(kinds)]
    cpu = torch.device("cpu")
    draws = StepDraws(cpu)
    steps = [[0, 1, 2, 3]] * 3 + [[1, 3], [1, 2], [4, 0], [4, 0], [5, 1], [5, 1], [2], [1, 2], [1, 2]]
    for position, members in enumerate(steps):
        chunks = [Chunk(sequences[i], (1,), position + 1, sequences[i].table, samples=True) for i in members]
        logits = random_logits(len(members), seed=position)
        alone = SamplingBatch.of([Draw.of(chunk) for chunk in chunks], cpu)
        staged = draws.stage(Batch(tuple(chunks)))
        assert sample_batch(logits.clone(), staged).fetch() == sample_batch(logits, alone).fetch()
