"""From records to a report: pure functions and the report's schema (documented in docs/loadgen.md).

Latencies are those of complete answers only; what failed is counted beside them, and goodput counts it as missed.
Times are in seconds. Unless a name ends in ``_sent``, they count from the intended start of a request.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field, JsonValue

from deltazip_loadgen.options import ReplayOptions
from deltazip_loadgen.record import Record
from deltazip_loadgen.stats import Distribution, distribution, jain
from deltazip_loadgen.trace import Frozen
from deltazip_loadgen.warn import warnings

REPORT_FORMAT: Literal["deltazip-report/1"] = "deltazip-report/1"


class Slo(Frozen):
    """What a user accepts; a limit that is not given always holds."""

    ttft_s: float | None = Field(None, gt=0, description="time to first token")
    tpot_s: float | None = Field(None, gt=0, description="time per output token after the first")

    def met(self, record: Record) -> bool:
        """Whether an answer is complete and fast enough. One without tokens is judged by its end."""
        first_s = record.latency_s if record.ttft_s is None else record.ttft_s
        return (
            record.ok
            and (self.ttft_s is None or first_s <= self.ttft_s)
            and (self.tpot_s is None or record.tpot_s is None or record.tpot_s <= self.tpot_s)
        )


class Group(Frozen):
    """A set of requests in numbers."""

    requests: int = Field(description="sent")
    ok: int = Field(description="with a complete answer")
    aborted: int = Field(description="cut off because the replay was stopped; neither good nor failed")
    errors: dict[str, int] = Field(description="failed requests by reason; a status as `http_error 429`")
    told: dict[str, str] = Field(default_factory=dict, description="by reason, what the first of them was told")
    prompt_tokens: int = Field(description="of complete answers, as counted by the server")
    output_tokens: int = Field(description="of complete answers, as counted by the server")
    requests_per_s: float = Field(description="complete answers per second of the whole replay")
    output_tokens_per_s: float = Field(description="tokens of complete answers per second of the whole replay")
    good: int = Field(description="complete answers within the SLO")
    goodput: float | None = Field(description="share of `good` in what was not aborted")
    goodput_per_s: float = Field(description="`good` per second of the whole replay")
    exact_match: float | None = Field(description="share of right answers among complete ones with an expected answer")
    ttft_s: Distribution | None = Field(description="time to first token")
    ttft_sent_s: Distribution | None = Field(description="time to first token, from the actual start")
    tpot_s: Distribution | None = Field(description="time per output token after the first")
    stall_s: Distribution | None = Field(description="longest wait between two groups of tokens of each answer")
    latency_s: Distribution | None = Field(description="time to the end of the answer")
    latency_sent_s: Distribution | None = Field(description="time to the end of the answer, from the actual start")


class Breakdown(Frozen):
    """All requests of a set, and those among them that found their delta on the device (warm) or not (cold)."""

    all: Group
    warm: Group | None
    cold: Group | None


class Fairness(Frozen):
    """How alike the variants were treated. Indices are Jain's: 1 is equal, 1/n is one variant taking all."""

    completion: float | None = Field(description="index of the variants' shares of complete answers")
    ttft: float | None = Field(description="index of the variants' mean times to first token")
    worst_to_median_ttft_p90: float | None = Field(description="the slowest variant's p90 over the median's")


class RunInfo(Frozen):
    """What was replayed, where and how."""

    url: str
    started_at: str = Field(description="ISO 8601, UTC")
    trace: str = Field(description="file name")
    seed: int | None
    generator: dict[str, JsonValue]
    options: ReplayOptions
    requests_in_trace: int
    interrupted: bool


class Report(Frozen):
    """The summary of one replay."""

    format: Literal["deltazip-report/1"] = REPORT_FORMAT
    run: RunInfo | None = None
    slo: Slo
    window_s: float = Field(description="from the first intended start to the last end; rates are over it")
    offered_per_s: float = Field(description="requests sent per second between the first and last intended start")
    total: Breakdown
    variants: dict[str, Breakdown] = Field(description="by what was put in `model`")
    tiers: dict[str, int] = Field(description="requests by the tier their delta was in; `unknown` without the header")
    fairness: Fairness
    lag_s: Distribution | None = Field(description="how late this client was; the server has no part in it")
    warnings: tuple[str, ...] = Field(description="why the numbers may not mean what they seem to")


def summarize(records: Sequence[Record], *, slo: Slo | None = None, run: RunInfo | None = None) -> Report:
    """The report of some records, in any order; also of none."""
    slo = slo or Slo()
    intended = [record.intended_s for record in records]
    window_s = max((record.end_s for record in records), default=0.0) - min(intended, default=0.0)
    variants = {
        model: _breakdown([record for record in records if record.model == model], slo, window_s)
        for model in sorted({record.model for record in records})
    }
    return Report(
        run=run,
        slo=slo,
        window_s=window_s,
        offered_per_s=_per_s(len(records) - 1, max(intended, default=0.0) - min(intended, default=0.0)),
        total=_breakdown(records, slo, window_s),
        variants=variants,
        tiers=dict(Counter(record.tier or "unknown" for record in records)),
        fairness=_fairness(variants),
        lag_s=distribution([record.lag_s for record in records]),
        warnings=tuple(warnings(records, run.options.max_concurrency if run else None)),
    )


def _breakdown(records: Sequence[Record], slo: Slo, window_s: float) -> Breakdown:
    warm = [record for record in records if record.warmth == "warm"]
    cold = [record for record in records if record.warmth == "cold"]
    return Breakdown(
        all=_group(records, slo, window_s),
        warm=_group(warm, slo, window_s) if warm else None,
        cold=_group(cold, slo, window_s) if cold else None,
    )


def _group(records: Sequence[Record], slo: Slo, window_s: float) -> Group:
    complete = [record for record in records if record.ok]
    aborted = sum(record.outcome == "aborted" for record in records)
    good = sum(slo.met(record) for record in complete)
    correct = [record.correct for record in complete if record.correct is not None]
    output_tokens = sum(record.output_tokens or 0 for record in complete)

    def spread(of: Callable[[Record], float | None]) -> Distribution | None:
        return distribution([value for record in complete if (value := of(record)) is not None])

    return Group(
        requests=len(records),
        ok=len(complete),
        aborted=aborted,
        errors=_errors(records),
        told=_told(records),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in complete),
        output_tokens=output_tokens,
        requests_per_s=_per_s(len(complete), window_s),
        output_tokens_per_s=_per_s(output_tokens, window_s),
        good=good,
        goodput=good / (len(records) - aborted) if len(records) > aborted else None,
        goodput_per_s=_per_s(good, window_s),
        exact_match=sum(correct) / len(correct) if correct else None,
        ttft_s=spread(lambda record: record.ttft_s),
        ttft_sent_s=spread(lambda record: record.ttft_sent_s),
        tpot_s=spread(lambda record: record.tpot_s),
        stall_s=spread(lambda record: record.stall_s),
        latency_s=spread(lambda record: record.latency_s),
        latency_sent_s=spread(lambda record: record.latency_sent_s),
    )


def _errors(records: Iterable[Record]) -> dict[str, int]:
    """Failed requests by reason, the most frequent first."""
    return dict(Counter(record.reason for record in records if record.reason is not None).most_common())


def _told(records: Iterable[Record]) -> dict[str, str]:
    told: dict[str, str] = {}
    for record in records:
        if record.reason is not None:
            told.setdefault(record.reason, record.told)
    return told


def _fairness(variants: dict[str, Breakdown]) -> Fairness:
    groups = [breakdown.all for breakdown in variants.values()]
    spreads = [group.ttft_s for group in groups if group.ttft_s is not None]
    p90s = [spread.p90 for spread in spreads]
    median = float(np.median(p90s)) if p90s else 0.0
    finished = [group for group in groups if group.requests > group.aborted]
    return Fairness(
        completion=jain([group.ok / (group.requests - group.aborted) for group in finished]),
        ttft=jain([spread.mean for spread in spreads]),
        worst_to_median_ttft_p90=max(p90s) / median if median else None,
    )


def _per_s(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
