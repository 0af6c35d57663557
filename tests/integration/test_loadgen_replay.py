"""The replay is open-loop: what the server does changes nothing about when requests start."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest

from deltazip_loadgen import Event, ReplayOptions, TraceRequest, replay, summarize
from deltazip_loadgen.errors import SettingInvalid, TraceInvalid
from tests.support.sse_server import SLOW_S, FaultyServer


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


def completions(model: str, times: list[float], max_tokens: int = 1) -> list[TraceRequest]:
    return [
        TraceRequest(at_s=at_s, model=model, endpoint="completion", prompt="x", max_tokens=max_tokens) for at_s in times
    ]


async def test_a_frozen_server_does_not_stop_the_client(server: FaultyServer) -> None:
    """The whole server stands still for a second; a closed-loop client would send nothing and measure nothing."""
    freeze_s, every_s = 1.0, 0.05
    trace = completions("fine", [every_s * i for i in range(30)])
    asyncio.get_running_loop().call_later(0.3, server.freeze, freeze_s)
    records = await replay(trace, server.url)
    assert all(record.ok for record in records)
    gaps = [later.sent_s - earlier.sent_s for earlier, later in pairwise(records)]
    assert max(gaps) < freeze_s / 2, "requests were not sent while the server stood still"
    # Those due in the freeze wait for its end: 1.0, 0.95, 0.9 … s. Omitting them would leave one slow sample.
    ttfts = [record.ttft_s or 0.0 for record in records]
    assert sum(ttft > 0.25 for ttft in ttfts) >= 10
    assert sum(ttft > 0.5 for ttft in ttfts) >= 6
    report = summarize(records)
    assert report.total.all.ttft_s is not None
    assert report.total.all.ttft_s.p90 > 0.5
    assert report.total.all.ttft_s.max >= 0.8 * freeze_s


async def test_slow_answers_overlap_without_limit(server: FaultyServer) -> None:
    """The server answers none of them before it has them all."""
    server.crowd = 300
    records = await replay(completions("crowd", [0.0] * 300), server.url, options=ReplayOptions(timeout_s=60))
    assert all(record.ok for record in records)


async def test_max_concurrency_holds_requests_back_and_shows_the_wait(server: FaultyServer) -> None:
    options = ReplayOptions(max_concurrency=2)
    records = await replay(completions("slow-first", [0.0] * 6), server.url, options=options)
    assert server.most_under_way == 2
    waited = sorted(record.lag_s for record in records)
    assert waited[1] < SLOW_S <= waited[2] < 2 * SLOW_S <= waited[4]
    last = max(records, key=lambda record: record.sent_s)
    assert last.ttft_s is not None
    assert last.ttft_sent_s is not None
    assert last.ttft_s - last.ttft_sent_s == pytest.approx(last.lag_s)
    assert last.ttft_s >= 3 * SLOW_S


async def test_speed_scales_time_and_duration_ends_sending(server: FaultyServer) -> None:
    options = ReplayOptions(speed=10, duration_s=0.5)
    records = await replay(completions("fine", [0.0, 1.0, 4.9, 5.1, 60.0]), server.url, options=options)
    assert [record.intended_s for record in records] == pytest.approx([0.0, 0.1, 0.49])
    assert all(record.sent_s >= record.intended_s for record in records)
    assert len(server.seen) == 3


async def test_stop_records_what_is_under_way_and_sends_no_more(server: FaultyServer) -> None:
    stop = asyncio.Event()
    trace = [*completions("fine", [0.0, 0.0]), *completions("hang", [0.1, 0.1, 0.1]), *completions("fine", [30.0])]
    asyncio.get_running_loop().call_later(0.8, stop.set)
    started = time.monotonic()
    records = await replay(trace, server.url, stop=stop)
    assert time.monotonic() - started < 10
    assert Counter(record.outcome for record in records) == {"ok": 2, "aborted": 3}
    assert {record.text for record in records if record.outcome == "aborted"} == {"w0 w1 "}


async def test_cancelling_the_replay_cancels_its_requests(server: FaultyServer) -> None:
    task = asyncio.create_task(replay(completions("hang", [0.0] * 4), server.url))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_events_tell_each_request_once(server: FaultyServer) -> None:
    events: list[Event] = []
    trace = completions("fine", [0.0, 0.05], max_tokens=3) + completions("error-500", [0.1])
    records = await replay(trace, server.url, on_event=events.append)
    assert Counter((event.kind, event.model) for event in events) == {
        ("sent", "fine"): 2,
        ("first_token", "fine"): 2,
        ("finished", "fine"): 2,
        ("sent", "error-500"): 1,
        ("finished", "error-500"): 1,
    }
    finished = [event.record for event in events if event.kind == "finished"]
    assert sorted(finished, key=lambda record: record.index if record else -1) == records


async def test_a_late_client_is_blamed_and_not_the_server(server: FaultyServer) -> None:
    """The client's own event loop stands still: times from the intended start show it, a warning says whose fault."""
    asyncio.get_running_loop().call_later(0.1, time.sleep, 0.5)
    records = await replay(completions("fine", [0.02 * i for i in range(20)]), server.url)
    late = [record for record in records if record.lag_s > 0.05]
    assert len(late) >= 8
    assert all(record.latency_s > record.lag_s for record in late)
    report = summarize(records)
    assert any("this client, not the server" in warning for warning in report.warnings)
    assert report.lag_s is not None
    assert report.lag_s.max > 0.2


async def test_errors_of_the_trace_and_of_the_url_are_raised_as_they_are(server: FaultyServer) -> None:
    def broken() -> Iterator[TraceRequest]:
        yield from completions("fine", [0.0])
        raise TraceInvalid("trace.jsonl:3: bad")

    with pytest.raises(TraceInvalid, match=r"trace\.jsonl:3"):
        await replay(broken(), server.url)
    for url in ("127.0.0.1:8000", "ftp://host", "http://", "http://[::1"):
        with pytest.raises(SettingInvalid, match=r"http://127\.0\.0\.1:8000"):
            await replay([], url)


async def test_an_empty_trace_gives_no_records(server: FaultyServer) -> None:
    assert await replay([], server.url) == []
