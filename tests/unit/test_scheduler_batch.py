"""What a step consists of: chunks, segments, sampling, budget."""

import math
from itertools import pairwise

import pytest

from deltazip_kernels.device.fused import TALL
from deltazip_kernels.plan import MORE
from deltazip_ray.config import EngineConfig
from deltazip_ray.errors import EngineError, InvalidRequest, PromptTooLong
from deltazip_ray.scheduler.admission import ROWS_AT_ONCE
from deltazip_ray.scheduler.batch import DRAWN, NOT_FINITE, TILE_ROWS, Batch, Drawn
from deltazip_ray.scheduler.outbox import End
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams, TokenChunk, TokenLogprobs
from deltazip_ray.scheduler.scheduler import Scheduler


def request(name: str, prompt: int, max_tokens: int = 4, **sampling: object) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return GenerateRequest(name, None, tuple(range(100, 100 + prompt)), params)


def scheduler(**settings: int) -> Scheduler:
    return Scheduler(EngineConfig(**{"kv_blocks": 64, "block_size": 4, "max_batch_tokens": 16} | settings))


def news(sched: Scheduler) -> dict[str, End]:
    return dict(sched.take_news())


def step(sched: Scheduler, token: int = 7) -> tuple[Batch, dict[str, End]]:
    batch = sched.schedule()
    sched.update(batch, Drawn([token] * len(batch.sampling_chunks)))
    sched.check()
    return batch, news(sched)


def shape(batch: Batch) -> list[tuple[str, int, int, bool]]:
    return [(c.request_id, c.start, len(c.tokens), c.samples) for c in batch.chunks]


def test_a_prompt_longer_than_the_budget_runs_in_chunks_and_samples_at_its_end() -> None:
    sched = scheduler()
    sched.add(request("a", 35), slot=-1)
    batches = [step(sched)[0] for _ in range(4)]
    assert [shape(b) for b in batches] == [
        [("a", 0, 16, False)],
        [("a", 16, 16, False)],
        [("a", 32, 3, True)],
        [("a", 35, 1, True)],
    ]
    assert batches[1].chunks[0].tokens == tuple(range(116, 132))
    assert batches[3].chunks[0].tokens == (7,), "the sampled token is run next"
    assert [c.output_index for b in batches for c in b.sampling_chunks] == [0, 1]
    assert len(batches[0].chunks[0].block_table) >= 9


def test_chunks_are_sorted_by_slot_and_segments_are_consecutive() -> None:
    sched = scheduler()
    for name, slot in [("a", 2), ("b", -1), ("c", 2), ("d", 0), ("e", -1)]:
        sched.add(request(name, 2), slot)
    batch, _ = step(sched)
    assert [c.request_id for c in batch.chunks] == ["b", "e", "d", "a", "c"]
    assert batch.segments() == ([0, 4, 6, 10], [-1, 0, 2])
    assert batch.num_tokens == 10


def test_prompts_come_last_by_their_versions_rows_and_decodes_find_their_tokens_all_the_same() -> None:
    sched = scheduler(max_batch_tokens=1024, kv_blocks=1024)
    for name, slot, prompt in [("a", 0, 300), ("b", 1, 1), ("c", -1, 400), ("d", 2, 2), ("e", 0, 1), ("f", 2, 1)]:
        sched.add(request(name, prompt), slot)
    batch = sched.schedule()
    assert [c.request_id for c in batch.chunks] == ["f", "e", "b", "c", "d", "a"]
    assert (batch.segments()[1], batch.versions) == ([2, 0, 1, -1, 2, 0], 4)
    ahead = sched.schedule()
    assert [(c.request_id, c.drawn_row) for c in ahead.chunks] == [
        ("c", 3),
        ("a", 5),
        ("e", 1),
        ("b", 2),
        ("d", 4),
        ("f", 0),
    ]
    sched.update(batch, Drawn(range(6)))
    assert news(sched) == {name: TokenChunk((token,)) for token, name in enumerate("febcda")}


@pytest.mark.parametrize("prompt", [310, 256, 250, 5000])
def test_prompts_of_a_version_are_cut_where_its_rows_are_whole_tiles(prompt: int) -> None:
    for slot, first in ((0, 2048), (-1, 2100)):
        sched = scheduler(max_batch_tokens=2100, kv_blocks=8192, max_model_len=8192)
        for i in range(10):
            sched.add(request(str(i), prompt), slot)
        assert sched.schedule().num_tokens == first


def test_a_version_whose_prompt_found_no_room_goes_on_in_the_next_step() -> None:
    sched = scheduler(max_batch_tokens=2100, kv_blocks=8192, kv_prefix_cache=False)
    for i in range(24):
        prompt = GenerateRequest(str(i), f"v{i % 2}", (7,) * 256, SamplingParams(max_tokens=4))
        sched.add(prompt, i % 2)
    segments = [step(sched)[0].segments() for _ in range(2)]
    assert segments[0] == ([0, 2048], [0])
    assert segments[1] == ([0, 8 + 256, 8 + 8 * 256], [0, 1])


def test_prompts_are_cut_anywhere_in_small_steps() -> None:
    sched = scheduler(max_batch_tokens=2047, kv_blocks=2048)
    for name in "abc":
        sched.add(request(name, 1000), 0)
    assert [step(sched)[0].num_tokens for _ in range(2)] == [2047, 2 + 953]


def test_an_empty_batch_is_false_and_is_not_waited_for() -> None:
    sched = scheduler()
    batch = sched.schedule()
    assert not batch
    assert batch.segments() == ([0], [])
    assert not sched.has_work


def test_decodes_come_first_and_prefills_take_the_rest() -> None:
    sched = scheduler()
    sched.add(request("a", 2), 0)
    sched.add(request("b", 2), 0)
    step(sched)
    sched.add(request("long", 40), 0)
    batch, _ = step(sched)
    assert sorted(shape(batch)) == [("a", 2, 1, True), ("b", 2, 1, True), ("long", 0, 14, False)]


def test_the_oldest_prefill_advances_in_every_step_even_when_decodes_could_fill_the_budget() -> None:
    """Four tokens a step for four running requests: three decodes leave one token for the prefill."""
    sched = scheduler(max_batch_tokens=4, max_running=64)
    for name in "abc":
        sched.add(request(name, 1, max_tokens=50), 0)
    step(sched)
    sched.add(request("long", 10, max_tokens=1), 0)
    sched.add(request("later", 1), 0)
    progress = [next(c.start for c in step(sched)[0].chunks if c.request_id == "long") for _ in range(10)]
    assert progress == list(range(10))
    assert sched.num_running == 3, "the long one is done"


def test_output_is_reported_once_and_ends_with_a_reason() -> None:
    sched = scheduler()
    sched.add(request("a", 2, max_tokens=2), 0)
    assert step(sched, 5)[1] == {"a": TokenChunk((5,))}
    assert step(sched, 6)[1] == {"a": TokenChunk((6,), "length")}
    assert not sched.has_work
    assert sched.blocks.free_blocks == 64


def test_a_stop_token_ends_the_output_and_is_not_returned() -> None:
    sched = scheduler()
    sched.add(request("a", 2, stop_token_ids=frozenset({9})), 0)
    sched.add(request("b", 2, stop_token_ids=frozenset({9}), ignore_eos=True), 0)
    assert step(sched, 9)[1] == {"a": TokenChunk((), "stop"), "b": TokenChunk((9,))}


def test_output_index_counts_tokens_of_an_earlier_replica() -> None:
    """With 3 of 5 tokens made elsewhere, two are left, and their draws have positions 3 and 4."""
    sched = scheduler()
    sched.add(GenerateRequest("a", None, (1, 2, 3, 4, 5), SamplingParams(max_tokens=5), output_offset=3), 0)
    indices = []
    told: dict[str, End] = {}
    while sched.has_work:
        batch, told = step(sched)
        indices += [c.output_index for c in batch.sampling_chunks]
    assert indices == [3, 4]
    assert told == {"a": TokenChunk((7,), "length")}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (request("a", 0), InvalidRequest),
        (request("a", 2, max_tokens=0), InvalidRequest),
        (GenerateRequest("a", None, (1, 2), SamplingParams(max_tokens=5), output_offset=2), InvalidRequest),
        (GenerateRequest("a", None, (1, 2, 3), SamplingParams(max_tokens=2), output_offset=2), InvalidRequest),
        (GenerateRequest("a", None, (1, 2), SamplingParams(), output_offset=-1), InvalidRequest),
        (request("a", 60, max_tokens=41), PromptTooLong),
        (GenerateRequest("a", None, (1, 2), priority=17), InvalidRequest),
        (GenerateRequest("a", None, (1, 2), weight=0.0), InvalidRequest),
        (GenerateRequest("a", None, (1, 2), weight=math.nan), InvalidRequest),
    ],
)
def test_what_can_never_run_is_refused_up_front(bad: GenerateRequest, error: type[Exception]) -> None:
    sched = scheduler(max_model_len=100)
    with pytest.raises(error):
        sched.add(bad, 0)
    assert not sched.has_work


def test_a_request_that_just_fits_the_cache_runs_and_one_more_token_is_refused() -> None:
    sched = scheduler(kv_blocks=3, block_size=4)
    with pytest.raises(PromptTooLong, match="kv_blocks"):
        sched.add(request("big", 10, max_tokens=4), 0)
    sched.add(request("fits", 10, max_tokens=3), 0)
    told = [step(sched)[1] for _ in range(3)]
    assert told == [{"fits": TokenChunk((7,))}] * 2 + [{"fits": TokenChunk((7,), "length")}]


def test_an_id_is_live_only_once() -> None:
    sched = scheduler()
    sched.add(request("a", 2), 0)
    with pytest.raises(InvalidRequest, match="already"):
        sched.add(request("a", 2), 0)
    sched.abort("a")
    assert news(sched) == {"a": None}
    sched.add(request("a", 2), 0)


def test_update_wants_the_batches_in_order_and_one_token_for_each_sampling_chunk() -> None:
    sched = scheduler()
    sched.add(request("a", 2), 0)
    first, second = sched.schedule(), sched.schedule()
    with pytest.raises(EngineError, match="update first"):
        sched.schedule()
    with pytest.raises(EngineError, match="0 tokens for 1"):
        sched.update(first, Drawn([]))
    with pytest.raises(EngineError, match="order"):
        sched.update(second, Drawn([1]))
    sched.update(first, Drawn([1]))
    with pytest.raises(EngineError, match="order"):
        sched.fail(first, EngineError("again"))
    assert news(sched) == {"a": TokenChunk((1,))}


def test_abort_in_every_state_gives_everything_back() -> None:
    sched = scheduler(max_running=2)
    for name, prompt in [("a", 10), ("b", 20), ("c", 20)]:
        sched.add(request(name, prompt), 0)
    sched.abort("c")
    assert news(sched) == {"c": None}, "it was waiting"
    batch = sched.schedule()
    sched.abort("a")
    sched.abort("a")
    sched.check()
    assert news(sched) == {}, "a batch on its way has it"
    with pytest.raises(InvalidRequest, match="already"):
        sched.add(request("a", 3), 1)
    sched.update(batch, Drawn([1]))
    assert news(sched) == {"a": None}, "its token is dropped"
    sched.abort("b")
    assert news(sched) == {"b": None}, "it was in the middle of its prompt"
    sched.abort("a")
    sched.check()
    assert (news(sched), sched.blocks.free_blocks, sched.has_work) == ({}, 64, False)


def test_preemption_takes_the_youngest_and_keeps_its_output() -> None:
    """Two requests of one block each, three blocks: when both grow, the younger one goes and recomputes later."""
    sched = scheduler(kv_blocks=3, block_size=4, kv_prefix_cache=False)
    sched.add(request("old", 3, max_tokens=6), 0)
    sched.add(request("young", 3, max_tokens=6), 0)
    output: dict[str, list[int]] = {"old": [], "young": []}
    token, recomputed = 0, 0
    while sched.has_work:
        batch = sched.schedule()
        for chunk in batch.chunks:
            recomputed += chunk.request_id == "young" and chunk.start == 0 and len(chunk.tokens) > 3
        drawn = Drawn([token + i for i in range(len(batch.sampling_chunks))])
        token += len(drawn.tokens)
        sched.update(batch, drawn)
        for name, chunk_out in sched.take_news():
            assert isinstance(chunk_out, TokenChunk)
            output[name] += chunk_out.tokens
        sched.check()
    assert (sched.preemptions, recomputed) == (1, 1)
    assert [len(tokens) for tokens in output.values()] == [6, 6]
    assert len(set(output["old"] + output["young"])) == 12, "no token comes twice"


def test_the_lowest_priority_is_preempted_before_the_youngest() -> None:
    sched = scheduler(kv_blocks=3, block_size=4)
    for name, priority in [("low", 0), ("high", 1)]:
        sched.add(GenerateRequest(name, None, (1, 2, 3), SamplingParams(max_tokens=6), priority=priority), 0)
    ends = []
    while sched.has_work:
        ends += [name for name, end in step(sched)[1].items() if end != TokenChunk((7,))]
    assert (sched.preemptions, ends) == (1, ["high", "low"])


def test_admission_leaves_running_requests_a_block_to_grow_into() -> None:
    """Two free blocks would take the newcomer's eight tokens, but the running one would find none for its next."""
    sched = scheduler(kv_blocks=3, block_size=4)
    sched.add(request("old", 3, max_tokens=4), 0)
    step(sched)
    sched.add(request("new", 8, max_tokens=2), 0)
    seen = [name for _ in range(5) for name, *_ in shape(step(sched)[0])]
    assert seen == ["old"] * 3 + ["new"] * 2
    assert sched.preemptions == 0


def test_one_step_ahead_a_decode_carries_the_token_that_is_being_drawn() -> None:
    sched = scheduler()
    sched.add(request("b", 5, max_tokens=3), 1)
    sched.add(request("a", 2, max_tokens=3), 0)
    first, second = sched.schedule(), sched.schedule()
    assert [(c.request_id, c.tokens, c.start, c.output_index, c.drawn_row) for c in second.chunks] == [
        ("a", (DRAWN,), 2, 1, 0),
        ("b", (DRAWN,), 5, 1, 1),
    ]
    sched.update(first, Drawn([7, 8]))
    third = sched.schedule()
    sched.update(second, Drawn([9, 10]))
    assert not sched.schedule(), "the last tokens of both are being drawn"
    sched.update(third, Drawn([11, 12]))
    assert news(sched) == {"a": TokenChunk((9, 11), "length"), "b": TokenChunk((10, 12), "length")}
    assert not sched.has_work


def test_a_stop_token_is_found_one_step_late_and_the_end_is_told_when_no_step_has_the_request() -> None:
    sched = scheduler()
    sched.add(request("a", 4, stop_token_ids=frozenset({9})), 0)
    first, second = sched.schedule(), sched.schedule()
    sched.update(first, Drawn([9]))
    assert (news(sched), sched.num_running, sched.blocks.free_blocks) == ({}, 0, 64)
    assert not sched.schedule()
    sched.update(second, Drawn([5]))
    assert (news(sched), sched.has_work) == ({"a": TokenChunk((), "stop")}, False)


def test_a_sequential_request_waits_for_its_token_and_keeps_its_share_of_the_step() -> None:
    sched = scheduler(max_batch_tokens=2)
    sched.add(request("a", 1, repetition_penalty=1.1), 0)
    first = sched.schedule()
    sched.add(request("b", 2), 0)
    second = sched.schedule()
    assert shape(second) == [("b", 0, 1, False)], "one of the two tokens is kept for the one that waits"
    sched.update(first, Drawn([7]))
    assert sorted((c.request_id, c.tokens) for c in sched.schedule().chunks) == [("a", (7,)), ("b", (101,))]


def test_logits_that_are_not_finite_fail_their_request_alone() -> None:
    sched = scheduler()
    sched.add(request("a", 2), 0)
    sched.add(request("b", 2), 1)
    batch = sched.schedule()
    sched.update(batch, Drawn([NOT_FINITE, 5]))
    told = news(sched)
    assert isinstance(told.pop("a"), EngineError)
    assert told == {"b": TokenChunk((5,))}
    sched.check()


def test_tokens_before_logits_that_are_not_finite_come_with_as_many_logprobs() -> None:
    sched = scheduler()
    sched.add(request("a", 2, logprobs=0), 0)
    told = []
    for token, logprob in ((5, -0.5), (6, -0.6), (NOT_FINITE, math.nan)):
        sched.update(sched.schedule(), Drawn([token], {0: TokenLogprobs(logprob)}))
        told += sched.take_news(0)
    first, second, (_, error) = told
    assert first == ("a", TokenChunk((5,), logprobs=(TokenLogprobs(-0.5),)))
    assert second == ("a", TokenChunk((6,), logprobs=(TokenLogprobs(-0.6),)))
    assert isinstance(error, EngineError)


def test_a_failed_step_fails_its_requests_also_in_the_step_launched_behind_it() -> None:
    sched = scheduler()
    sched.add(request("a", 4), 0)
    first = sched.schedule()
    sched.add(request("b", 4), 0)
    second = sched.schedule()
    sched.fail(first, EngineError("broken"))
    assert news(sched) == {}
    sched.update(second, Drawn([1, 2]))
    told = news(sched)
    assert isinstance(told.pop("a"), EngineError)
    assert told == {"b": TokenChunk((2,))}
    sched.check()


@pytest.mark.parametrize("ahead", [False, True])
def test_versions_that_wait_get_as_many_rows_as_kernels_serve_at_once(*, ahead: bool) -> None:
    """Also where a step's budget ends in the middle of one, and when rows are given again to others."""
    sched = scheduler(max_running=128, max_batch_tokens=1024, kv_blocks=4096, fair_lead_tokens=4096)
    for i in range(256):
        prompt = GenerateRequest(str(i), f"v{i % 4}", (7,) * 32, SamplingParams(max_tokens=20, ignore_eos=True))
        sched.add(prompt, i % 4)
    uneven, waiting = 0, []
    while sched.num_waiting or sched.num_running == 128:
        waiting.append(sched.schedule())
        starts, _ = waiting[-1].segments()
        if waiting[-1].num_tokens == 128:
            uneven += {stop - start for start, stop in pairwise(starts)} != {ROWS_AT_ONCE}
        if len(waiting) > ahead:
            batch = waiting.pop(0)
            sched.update(batch, Drawn([7] * len(batch.sampling_chunks)))
    assert uneven == 0
    assert ROWS_AT_ONCE == MORE
    assert TALL.value == TILE_ROWS


def test_first_tokens_and_ends_are_told_at_once_and_the_others_in_turn() -> None:
    sched = scheduler()
    for name in "abcd":
        sched.add(request(name, 2, max_tokens=5), -1)
    told = []
    for _ in range(5):
        batch = sched.schedule()
        sched.update(batch, Drawn([7] * 4))
        told.append([(name, len(item.tokens)) for name, item in sched.take_news(1) if isinstance(item, TokenChunk)])
    everybody = [(name, 1) for name in "abcd"]
    assert told == [everybody, [("a", 1)], [("b", 2)], [("c", 3)], [("a", 3), ("b", 2), ("c", 1), ("d", 4)]]


@pytest.mark.parametrize("aborted", [False, True])
def test_tokens_that_wait_to_be_told_come_before_an_error_and_not_after_an_abort(aborted: bool) -> None:
    sched = scheduler()
    sched.add(request("a", 2), -1)
    for _ in range(2):
        batch = sched.schedule()
        sched.update(batch, Drawn([7]))
        sched.take_news(0)
    batch = sched.schedule()
    if aborted:
        sched.abort("a")
    error = EngineError("a step failed")
    sched.fail(batch, error)
    assert sched.take_news(0) == ([("a", None)] if aborted else [("a", TokenChunk((7,))), ("a", error)])


def test_nothing_is_shared_of_a_request_that_failed() -> None:
    sched = scheduler(max_batch_tokens=8)
    sched.add(request("a", 13), slot=0)
    step(sched)
    batch = sched.schedule()
    sched.update(batch, Drawn([NOT_FINITE] * len(batch.sampling_chunks)))
    assert isinstance(news(sched)["a"], EngineError)
    sched.add(request("b", 13), slot=0)
    step(sched)
    assert sched.admission.prefix_hits == 0
