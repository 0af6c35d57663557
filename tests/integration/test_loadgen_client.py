"""The client against a server with known faults: every fault becomes a record that says what happened."""

from collections.abc import Iterator

import pytest

from deltazip_loadgen import Record, ReplayOptions, TraceRequest, replay
from tests.support.sse_server import EVENT_GAP_S, SLOW_S, FaultyServer


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


def chat(model: str, at_s: float = 0.0, max_tokens: int = 5, **more: object) -> TraceRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **more}
    return TraceRequest.model_validate(
        {"at_s": at_s, "model": model, "endpoint": "chat", "max_tokens": max_tokens, **body}
    )


async def one(server: FaultyServer, request: TraceRequest, **options: object) -> Record:
    (record,) = await replay([request], server.url, options=ReplayOptions.model_validate(options))
    return record


async def test_a_good_answer_is_recorded_whole(server: FaultyServer) -> None:
    request = chat("fine", max_tokens=6, expected="w0 w1 w2 w3 w4 w5", tags={"task": "count"})
    record = await one(server, request)
    assert (record.outcome, record.status, record.error) == ("ok", 200, None)
    assert record.text == "w0 w1 w2 w3 w4 w5 "
    assert record.correct is True
    assert record.tags == {"task": "count"}
    assert record.finish_reason == "length"
    assert (record.prompt_tokens, record.output_tokens) == (7, 6)
    assert (record.tier, record.version, record.request_id) == ("device", "v1", "r1")
    assert record.warmth == "warm"
    assert 2 <= len(record.arrivals_s) <= 6
    assert list(record.arrivals_s) == sorted(set(record.arrivals_s))
    assert record.intended_s <= record.sent_s < record.arrivals_s[0] < record.arrivals_s[-1] <= record.end_s
    assert record.tpot_s is not None
    assert record.tpot_s > 0.5 * EVENT_GAP_S


async def test_completions_have_their_own_endpoint_and_event_shape(server: FaultyServer) -> None:
    request = TraceRequest(at_s=0, model="fine", endpoint="completion", prompt="1 2", max_tokens=2, expected="w0")
    record = await one(server, request)
    assert (record.outcome, record.text, record.output_tokens, record.correct) == ("ok", "w0 w1 ", 2, False)
    assert server.seen[-1].path == "/v1/completions"


async def test_what_is_sent_is_the_request_and_no_more(server: FaultyServer) -> None:
    request = chat("fine", temperature=0.5, seed=9, tags={"a": "b"}, expected="secret")
    await replay([request], server.url + "/v1/", options=ReplayOptions(extra_body={"ignore_eos": True}), api_key="k")
    seen = server.seen[-1]
    assert seen.body == {
        "model": "fine",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["authorization"] == "Bearer k"


async def test_a_slow_first_token_is_in_ttft_and_not_in_tpot(server: FaultyServer) -> None:
    record = await one(server, chat("slow-first"))
    assert record.outcome == "ok"
    assert record.ttft_sent_s is not None
    assert record.ttft_sent_s >= SLOW_S
    assert record.tpot_s is not None
    assert record.tpot_s < SLOW_S / 2
    assert record.warmth == "cold"


async def test_the_empty_role_event_is_no_first_token(server: FaultyServer) -> None:
    record = await one(server, chat("stall"))
    assert record.text == "w0 w1 late"
    assert len(record.arrivals_s) in (2, 3)


async def test_a_stall_is_in_tpot_and_stall_and_not_in_ttft(server: FaultyServer) -> None:
    record = await one(server, chat("stall"))
    assert record.stall_s is not None
    assert record.stall_s >= SLOW_S
    assert record.tpot_s is not None
    assert record.tpot_s >= SLOW_S / 2
    assert record.ttft_sent_s is not None
    assert record.ttft_sent_s < SLOW_S


FAULTS = [
    ("error-500", "http_error", 500, "it broke", 0),
    ("error-429", "http_error", 429, "queues are full", 0),
    ("reset-early", "disconnected", None, "ReadError", 0),
    ("reset-midway", "disconnected", 200, "ReadError", 3),
    ("close-midway", "disconnected", 200, "RemoteProtocolError", 3),
    ("truncated", "truncated", 200, "without [DONE]", 3),
    ("stream-error", "stream_error", 200, "the replica died", 1),
    ("bad-json", "malformed", 200, "{not json", 0),
    ("bad-shape", "malformed", 200, "3 where a string belongs", 0),
    ("not-a-stream", "malformed", 200, "not an event stream", 0),
]


@pytest.mark.parametrize(("model", "outcome", "status", "reason", "words"), FAULTS)
async def test_every_fault_has_its_outcome_and_keeps_what_arrived(
    server: FaultyServer, model: str, outcome: str, status: int | None, reason: str, words: int
) -> None:
    record = await one(server, chat(model))
    assert (record.outcome, record.status) == (outcome, status)
    assert record.error is not None
    assert reason in record.error
    assert len(record.error) <= 2000
    assert record.text == "".join(f"w{i} " for i in range(words))
    assert bool(record.arrivals_s) == bool(words)
    assert record.correct is None


async def test_an_endless_answer_ends_at_the_timeout(server: FaultyServer) -> None:
    record = await one(server, chat("hang"), timeout_s=0.3)
    assert (record.outcome, record.text) == ("timeout", "w0 w1 ")
    assert 0.3 <= record.latency_sent_s < 5
    assert "0.3 s" in (record.error or "")


async def test_no_server_is_a_record_too() -> None:
    with FaultyServer() as gone:
        pass
    record = await one(gone, chat("fine"))
    assert (record.outcome, record.status) == ("connect", None)


async def test_an_answer_without_usage_is_good_but_uncounted(server: FaultyServer) -> None:
    record = await one(server, chat("no-usage"))
    assert (record.outcome, record.output_tokens, record.tpot_s) == ("ok", None, None)
    assert record.ttft_s is not None


async def test_faults_leave_other_requests_alone(server: FaultyServer) -> None:
    """All faults at once, twice, between good requests that reuse the connections."""
    trace = [chat(model, at_s=0.02 * i) for i, (model, *_) in enumerate(FAULTS * 2)]
    trace += [chat("fine", at_s=0.02 * i + 0.01) for i in range(len(trace))]
    trace.sort(key=lambda request: request.at_s)
    records = await replay(trace, server.url)
    assert [record.index for record in records] == list(range(len(trace)))
    assert {record.outcome for record in records if record.model == "fine"} == {"ok"}
    expected = {model: outcome for model, outcome, *_ in FAULTS}
    assert all(record.outcome == expected[record.model] for record in records if record.model != "fine")


async def test_connections_are_reused_when_idle() -> None:
    with FaultyServer() as server:
        await replay([chat("fine", at_s=0.15 * i, max_tokens=1) for i in range(5)], server.url)
        assert len(server.seen) == 5
        assert server.connections < 5
