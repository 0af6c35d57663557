"""The report's arithmetic on records made by hand, against numbers worked out by hand."""

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deltazip_loadgen import Record, ReplayOptions, Report, Slo, summarize
from deltazip_loadgen.report import RunInfo
from deltazip_loadgen.stats import distribution, jain
from deltazip_loadgen.tables import duration, render


def record(**fields: Any) -> Record:
    """A good, warm answer: sent on time at 10, first token at 11, ten tokens until 20, end at 21."""
    good: dict[str, Any] = {
        "index": 0,
        "model": "a",
        "endpoint": "chat",
        "intended_s": 10.0,
        "sent_s": 10.0,
        "arrivals_s": (11.0, 14.0, 20.0),
        "end_s": 21.0,
        "outcome": "ok",
        "status": 200,
        "prompt_tokens": 5,
        "output_tokens": 10,
        "tier": "device",
    }
    return Record.model_validate(good | fields)


def failed(outcome: str, **fields: Any) -> Record:
    unanswered = {
        "outcome": outcome,
        "status": None,
        "arrivals_s": (),
        "output_tokens": None,
        "tier": None,
        "error": "e",
    }
    return record(**unanswered | fields)


def test_times_of_one_record() -> None:
    late = record(sent_s=10.25)
    assert late.lag_s == 0.25
    assert (late.ttft_s, late.ttft_sent_s) == (1.0, 0.75)
    assert (late.latency_s, late.latency_sent_s) == (11.0, 10.75)
    assert late.tpot_s == 1.0, "9 s for the 9 tokens after the first"
    assert late.stall_s == 6.0


def test_times_that_are_not_known() -> None:
    silent = record(arrivals_s=(), output_tokens=0)
    assert (silent.ttft_s, silent.tpot_s, silent.stall_s) == (None, None, None)
    single = record(arrivals_s=(11.0,), output_tokens=1)
    assert (single.ttft_s, single.tpot_s, single.stall_s) == (1.0, None, None)
    assert record(output_tokens=None).tpot_s is None


@pytest.mark.parametrize(
    ("tier", "warmth"), [("device", "warm"), ("host", "cold"), ("disk", "cold"), ("remote", "cold"), (None, None)]
)
def test_cold_is_every_tier_but_the_device(tier: str | None, warmth: str | None) -> None:
    assert record(tier=tier).warmth == warmth


def test_white_space_around_an_answer_does_not_make_it_wrong() -> None:
    assert record(text=" 42\n", expected="42").correct is True
    assert record(text="4 2", expected="42").correct is False
    assert record(text="42").correct is None
    assert record(text="42", expected="42", outcome="truncated").correct is None


def test_percentiles_interpolate() -> None:
    spread = distribution([float(i) for i in range(1, 12)])
    assert spread is not None
    assert (spread.count, spread.mean, spread.p50, spread.p90, spread.p99, spread.max) == pytest.approx(
        (11, 6, 6, 10, 10.9, 11)
    )
    assert distribution([]) is None


def test_jain() -> None:
    assert jain([2, 2, 2, 2]) == 1
    assert jain([0, 0, 5, 0]) == 0.25
    assert jain([1, 3]) == 0.8
    assert jain([]) is None
    assert jain([0, 0]) is None


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=30), st.floats(0.01, 100))
def test_jain_has_its_bounds_and_no_unit(shares: list[float], unit: float) -> None:
    index = jain(shares)
    assert index is not None
    assert 1 / len(shares) - 1e-9 <= index <= 1 + 1e-9
    assert jain([unit * share for share in shares]) == pytest.approx(index)


def test_a_replay_in_numbers() -> None:
    records = [
        record(index=0),
        record(
            index=1, intended_s=12.0, sent_s=12.5, arrivals_s=(15.0, 17.0), end_s=17.0, output_tokens=3, tier="host"
        ),
        failed(
            "http_error",
            index=2,
            status=429,
            intended_s=13.0,
            sent_s=13.0,
            end_s=13.5,
            error='{"error": {"message": "full", "code": "overloaded"}}',
        ),
        failed("http_error", index=3, status=429, intended_s=14.0, sent_s=14.0, end_s=14.5),
        failed("timeout", index=4, status=200, intended_s=14.0, sent_s=14.0, end_s=30.0),
        failed("aborted", index=5, intended_s=20.0, sent_s=20.0, end_s=30.0),
    ]
    report = summarize(records)
    total = report.total.all
    assert report.window_s == 20.0
    assert report.offered_per_s == 0.5
    assert (total.requests, total.ok, total.aborted) == (6, 2, 1)
    assert total.errors == {"http_error 429": 2, "timeout": 1}
    assert total.told["http_error 429"] == "full"
    assert list(total.errors) == ["http_error 429", "timeout"], "the most frequent first"
    assert (total.prompt_tokens, total.output_tokens) == (10, 13)
    assert (total.requests_per_s, total.output_tokens_per_s) == (0.1, 0.65)
    assert (total.good, total.goodput, total.goodput_per_s) == (2, 0.4, 0.1)
    assert total.ttft_s is not None
    assert (total.ttft_s.count, total.ttft_s.mean, total.ttft_s.max) == (2, 2.0, 3.0)
    assert total.ttft_sent_s is not None
    assert total.ttft_sent_s.max == 2.5
    assert total.latency_s is not None
    assert (total.latency_s.mean, total.latency_s.max) == (8.0, 11.0)
    assert total.tpot_s is not None
    assert total.tpot_s.mean == 1.0
    assert total.exact_match is None
    assert report.total.warm is not None
    assert (report.total.warm.requests, report.total.warm.output_tokens) == (1, 10)
    assert report.total.cold is not None
    assert (report.total.cold.requests, report.total.cold.output_tokens) == (1, 3)
    assert report.tiers == {"device": 1, "host": 1, "unknown": 4}
    assert report.lag_s is not None
    assert report.lag_s.max == 0.5


def test_goodput_counts_failures_and_slow_answers_as_missed() -> None:
    records = [
        record(),
        record(arrivals_s=(13.0, 22.0), end_s=23.0),  # first token after 3 s
        record(arrivals_s=(11.0, 38.0), end_s=38.0),  # 3 s a token
        record(sent_s=12.0, arrivals_s=(12.5, 21.5)),  # 2.5 s after the intended start, 0.5 s after the actual one
        record(arrivals_s=(11.0,), output_tokens=1),  # no TPOT: nothing to miss
        record(arrivals_s=(), output_tokens=0, end_s=11.0),  # no token: judged by its end
        record(arrivals_s=(), output_tokens=0, end_s=13.0),
        failed("timeout"),
        failed("aborted"),
    ]
    assert [Slo(ttft_s=2.0, tpot_s=2.0).met(each) for each in records] == [
        *(True, False, False, False, True, True, False),
        *(False, False),
    ]
    total = summarize(records, slo=Slo(ttft_s=2.0, tpot_s=2.0)).total.all
    assert (total.good, total.goodput) == (3, 3 / 8)
    assert summarize(records, slo=Slo(ttft_s=2.0)).total.all.good == 4
    assert summarize(records, slo=Slo(tpot_s=2.0)).total.all.good == 6
    assert summarize(records).total.all.good == 7


def test_variants_and_fairness() -> None:
    records = [record(model="a") for _ in range(3)]
    records += [record(model="b", arrivals_s=(13.0,), tier="remote", text="x", expected="x") for _ in range(2)]
    records += [record(model="b", text="y", expected="x"), failed("connect", model="c")]
    report = summarize(records)
    assert list(report.variants) == ["a", "b", "c"]
    assert [breakdown.all.requests for breakdown in report.variants.values()] == [3, 3, 1]
    b = report.variants["b"]
    assert b.cold is not None
    assert b.cold.ttft_s is not None
    assert (b.cold.requests, b.cold.ttft_s.p50, b.cold.exact_match) == (2, 3.0, 1.0)
    assert b.warm is not None
    assert b.all.exact_match == pytest.approx(2 / 3)
    assert report.variants["c"].warm is None
    assert report.fairness.completion == pytest.approx(4 / (3 * 2)), "shares 1, 1, 0"
    # Means 1 and 7/3 s; c has none.
    assert report.fairness.ttft == pytest.approx((1 + 7 / 3) ** 2 / (2 * (1 + 49 / 9)))
    # p90s 1 and 3 s, median 2.
    assert report.fairness.worst_to_median_ttft_p90 == pytest.approx(1.5)


@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=20).flatmap(
        lambda ends: st.tuples(st.just(ends), st.permutations(ends))
    )
)
def test_the_order_of_records_does_not_matter(ends: tuple[list[float], list[float]]) -> None:
    """Records are written as they end and reported in the order of the trace."""
    one, other = ([record(end_s=21.0 + end, model="ab"[int(end) % 2]) for end in order] for order in ends)
    assert summarize(one) == summarize(other)


def test_no_records_at_all() -> None:
    report = summarize([])
    assert (report.window_s, report.total.all.requests, report.total.all.goodput) == (0.0, 0, None)
    assert report.total.all.ttft_s is None
    assert text_of(report)


def run_info(**options: Any) -> RunInfo:
    return RunInfo(
        url="http://x",
        started_at="2026-01-01T00:00:00+00:00",
        trace="t.jsonl",
        seed=1,
        generator={},
        options=ReplayOptions(**options),
        requests_in_trace=2,
        interrupted=False,
    )


def test_warnings() -> None:
    assert summarize([record()], run=run_info()).warnings == ()
    (late,) = summarize([record(), record(sent_s=10.4)]).warnings
    assert "1 of 2 requests were sent more than 50 ms late (up to 0.40 s)" in late
    (limited,) = summarize([record(), record(sent_s=10.4)], run=run_info(max_concurrency=1)).warnings
    assert "at most 1 requests" in limited
    assert "not an open-loop replay: 1 requests waited" in limited
    (unreached,) = summarize([failed("connect")]).warnings
    assert "is the server up" in unreached
    (uncounted,) = summarize([record(output_tokens=None), record()]).warnings
    assert "1 answers came without usage" in uncounted
    (untold,) = summarize([record(tier=None)]).warnings
    assert "x-deltazip-tier" in untold


def test_reports_and_records_survive_json() -> None:
    report = summarize([record(), failed("timeout", model="b")], slo=Slo(ttft_s=1.0), run=run_info())
    assert Report.model_validate_json(report.model_dump_json(), strict=True) == report
    assert json.loads(report.model_dump_json())["format"] == "deltazip-report/1"
    one = record(tags={"a": "b"}, expected="x")
    assert Record.model_validate_json(one.model_dump_json(exclude_defaults=True), strict=True) == one


def text_of(report: Report) -> str:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_the_table_shows_what_matters() -> None:
    records = [record(), record(model="[b]", tier="host", text="1", expected="1"), failed("http_error", status=503)]
    shown = text_of(summarize(records, slo=Slo(ttft_s=1.5)))
    for part in ("[b]", "warm", "cold", "1 s", "100.0%", "1 failed: http_error 503", "TTFT ≤ 1.5 s", "fairness"):
        assert part in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (0.9999, "1 s"), (12.34, "12.3 s"), (0, "0 ms"), (123.4, "123 s"), (4321.0, "4,321 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
