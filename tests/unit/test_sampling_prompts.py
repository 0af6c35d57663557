"""Log-probabilities of prompts: computed in pieces that fit, told of the right tokens."""

from collections.abc import Sequence

import pytest
import torch

from deltazip_ray.engine.sampling import PromptScores
from deltazip_ray.engine.sampling.prompts import RowLogits
from deltazip_ray.scheduler.batch import Batch, Chunk
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams
from deltazip_ray.scheduler.sequence import SequenceState

VOCAB = 11


def chunk(slot: int, prompt: tuple[int, ...], start: int, count: int, wanted: int | None) -> Chunk:
    """``count`` tokens of a prompt, from ``start`` on."""
    request = GenerateRequest("r", None, prompt, SamplingParams(prompt_logprobs=wanted))
    sequence = SequenceState(request, slot)
    sequence.scored = start
    return Chunk(
        sequence,
        prompt[start : start + count],
        start,
        sequence.table,
        samples=False,
        scored=sequence.score(start, start + count),
    )


def rows_of(table: torch.Tensor, seen: list[tuple[int, Sequence[tuple[int, int]]]]) -> RowLogits:
    def logits(rows: Sequence[int], runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        seen.append((len(rows), runs))
        return table[list(rows)]

    return logits


@pytest.mark.parametrize("most", [1, 4, 100])
def test_no_piece_is_larger_than_allowed_and_all_are_told(most: int) -> None:
    prompts = [(1, 2, 3, 4, 5, 6, 7), (9, 8, 7, 6, 5), (4, 4, 4)]
    chunks = (chunk(-1, prompts[0], 2, 5, 0), chunk(0, prompts[1], 0, 3, None), chunk(0, prompts[2], 0, 2, 3))
    table = torch.randn(10, VOCAB, generator=torch.Generator().manual_seed(1))
    seen: list[tuple[int, Sequence[tuple[int, int]]]] = []
    told = PromptScores.of(Batch(chunks), rows_of(table, seen), most).fetch()
    assert max(count for count, _ in seen) <= most
    assert sum(count for count, _ in seen) == 4 + 2, "the last token of a prompt has none behind it"
    assert all(sum(rows for _, rows in runs) == count for count, runs in seen)
    logprobs = table.log_softmax(-1)
    first, third = told
    assert first is not None
    assert third is not None
    assert [one.chosen for one in first] == pytest.approx([float(logprobs[i, 4 + i]) for i in range(4)])
    assert [len(one.best) for one in (*first, *third)] == [0] * 4 + [3] * 2
    assert [one.chosen for one in third] == pytest.approx([float(logprobs[8 + i, 4]) for i in range(2)])


def test_only_the_prompt_whose_logits_are_broken_is_refused() -> None:
    chunks = (chunk(-1, (1, 2, 3), 0, 3, 0), chunk(0, (3, 2, 1), 0, 3, 0))
    table = torch.zeros(6, VOCAB)
    table[4, 0] = torch.nan
    told = PromptScores.of(Batch(chunks), rows_of(table, []), 8).fetch()
    assert told[0] is not None
    assert told[1] is None
