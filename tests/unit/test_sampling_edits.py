"""Biases, penalties, masks and log-probabilities, against the logits processors of transformers."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.generation import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltazip_ray.engine.sampling import Draw, SamplingBatch, sample
from deltazip_ray.engine.sampling.draw import DrawState
from deltazip_ray.engine.sampling.edits import edits
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams, Structure

VOCAB = 96
HISTORY = [5, 9, 5, 5, 31, 9, 77]


def random_logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def draw(params: SamplingParams, tokens: Sequence[int] = HISTORY, output: int = 0, position: int = 0) -> Draw:
    """A draw after ``tokens``, of which the last ``output`` are output."""
    state = DrawState(GenerateRequest("r", None, tuple(tokens), params, output_offset=output))
    state.advance(tokens)
    return Draw.at(params, position, state)


def edited(logits: torch.Tensor, *draws: Draw) -> torch.Tensor:
    logits = logits.clone()
    for edit in edits(draws, logits.device):
        edit.apply(logits)
    return logits


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits()
    oracle = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([HISTORY]), logits.clone())
    found = edited(logits, draw(SamplingParams(repetition_penalty=penalty), output=3))
    torch.testing.assert_close(found, oracle, rtol=1e-6, atol=0)


def test_biases_come_before_penalties_as_in_transformers() -> None:
    logits = random_logits(seed=1)
    bias = {5: -7.5, 31: 100.0, 2: -100.0, 60: 3.25}
    oracle = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
            RepetitionPenaltyLogitsProcessor(1.7),
        ]
    )(torch.tensor([HISTORY]), logits.clone())
    params = SamplingParams(logit_bias=tuple(bias.items()), repetition_penalty=1.7)
    torch.testing.assert_close(edited(logits, draw(params)), oracle, rtol=1e-6, atol=1e-6)


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = random_logits(seed=2)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    taken = logits - edited(logits, draw(params, output=4))  # 5, 31, 9, 77 are output
    expected = torch.zeros(1, VOCAB)
    expected[0, [5, 31, 9, 77]] = 0.75
    torch.testing.assert_close(taken, expected, rtol=0, atol=1e-5)
    taken = logits - edited(logits, draw(params, output=6))  # so is one more 5, and 9
    expected[0, [5, 9]] = 1.0
    torch.testing.assert_close(taken, expected, rtol=0, atol=1e-5)


def test_a_state_that_grows_is_one_that_was_told_all_at_once() -> None:
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=-0.5, repetition_penalty=1.2)
    grown = DrawState(GenerateRequest("r", None, tuple(HISTORY[:3]), params))
    for end in (3, 4, 7):
        grown.advance(HISTORY[:end])
    logits = random_logits(seed=3)
    found = edited(logits, Draw.at(params, 4, grown))
    assert torch.equal(found, edited(logits, draw(params, output=4)))


@pytest.mark.parametrize("position", [0, 3, 4])
def test_no_stop_token_before_min_tokens(position: int) -> None:
    logits = random_logits(seed=4)
    oracle = MinLengthLogitsProcessor(4, [7, 8])(torch.zeros(1, position, dtype=torch.int64), logits.clone())
    # 5000: an end token that the vocabulary does not have.
    params = SamplingParams(min_tokens=4, stop_token_ids=frozenset({7, 8, 5000}), logit_bias=((8, 2.0), (9, 1.0)))
    found = edited(logits, draw(params, position=position))
    found[0, 8] -= 2.0
    found[0, 9] -= 1.0
    torch.testing.assert_close(found, oracle)


class _Allows:
    """A matcher of one moment."""

    def __init__(self, tokens: Sequence[int], vocab: int) -> None:
        self.seen: list[int] = []
        self._words = np.zeros((vocab + 31) // 32, dtype=np.int32)
        for token in tokens:
            self._words.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token: int) -> None:
        self.seen.append(token)

    def allowed(self) -> NDArray[np.int32]:
        return self._words


@pytest.mark.parametrize("vocab", [VOCAB - 40, VOCAB, VOCAB + 64])
def test_a_mask_leaves_what_is_allowed_in_its_own_rows(vocab: int) -> None:
    allowed = [0, 31, 32, 40, 55]
    matcher = _Allows(allowed, vocab)
    params = SamplingParams(structure=Structure("json"))
    request = GenerateRequest("r", None, (5, 9, 5, 31), params, output_offset=2, matcher=matcher)
    state = DrawState(request)
    state.advance([5, 9, 5, 31, 7])
    assert matcher.seen == [5, 31, 7]
    logits = random_logits(3, seed=5)
    found = edited(logits, Draw.at(SamplingParams(), 0), Draw.at(params, 0, state), Draw.at(SamplingParams(), 0))
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    assert found[1].isfinite().nonzero()[:, 0].tolist() == allowed
    assert torch.equal(found[1, allowed], logits[1, allowed])


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        (SamplingParams(min_p=0.2), [MinPLogitsWarper(0.2)]),
        (SamplingParams(temperature=0.7, min_p=0.05), [TemperatureLogitsWarper(0.7), MinPLogitsWarper(0.05)]),
        (
            SamplingParams(temperature=1.5, top_k=20, top_p=0.8, min_p=0.1),
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)],
        ),
        (SamplingParams(top_p=0.6, temperature=2.0), [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.6)]),
    ],
)
def test_tokens_come_as_often_as_transformers_says(params: SamplingParams, warpers: list[object]) -> None:
    logits, count = random_logits(seed=6), 20_000
    oracle = LogitsProcessorList(warpers)(torch.tensor([HISTORY]), logits.clone()).softmax(-1)[0].double()
    draws = [Draw.at(params, position) for position in range(count)]
    drawn = sample(logits.repeat(count, 1), SamplingBatch.of(draws, logits.device)).tokens.tolist()
    counts = Counter(drawn)
    found = torch.tensor([counts[token] / count for token in range(VOCAB)], dtype=torch.float64)
    assert set(found.nonzero()[:, 0].tolist()) <= set(oracle.nonzero()[:, 0].tolist())
    assert (found - oracle).abs().le(5 * (oracle * (1 - oracle) / count).sqrt() + 1e-9).all()


def test_logprobs_are_the_models_own_whatever_is_done_to_the_logits() -> None:
    logits = random_logits(4, seed=7)
    oracle = logits.log_softmax(-1)
    kinds = [
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.3, top_k=2, logprobs=0, seed=4),
        SamplingParams(temperature=0.0, logprobs=5, logit_bias=((11, 100.0),)),
    ]
    draws = [draw(params) for params in kinds]
    drawn = sample(logits.clone(), SamplingBatch.of(draws, logits.device)).fetch()
    assert drawn.tokens[1] == oracle[1].argmax()
    assert drawn.tokens[3] == 11
    assert set(drawn.logprobs) == {0, 2, 3}
    for row, count in ((0, 3), (2, 0), (3, 5)):
        told = drawn.logprobs[row]
        assert told.chosen == pytest.approx(float(oracle[row, drawn.tokens[row]]), abs=1e-5)
        best = oracle[row].topk(count)
        assert [token for token, _ in told.best] == best.indices.tolist()
        assert [value for _, value in told.best] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_least_logprob_can_be_written_as_json() -> None:
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 3] = 1.0
    draws = [Draw.at(SamplingParams(temperature=0.0, logprobs=20), 0)]
    told = sample(logits, SamplingBatch.of(draws, logits.device)).fetch().logprobs[0]
    assert told.best[0] == (3, 0.0)
    assert {value for _, value in told.best[1:]} == {-9999.0}
