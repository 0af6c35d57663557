"""A report on the terminal."""

from collections.abc import Callable
from typing import NamedTuple

from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from deltazip_loadgen.report import Group, Report
from deltazip_loadgen.stats import Distribution

WIDE = 120
_TOLD = 300


class Column(NamedTuple):
    """One number of a group; those that are not ``always`` shown need a terminal of ``WIDE`` columns."""

    name: str
    cell: Callable[[Group], str | Text]
    always: bool = True


def _failed(group: Group) -> Text:
    failed = group.requests - group.ok - group.aborted
    return Text(str(failed), style="red" if failed else "")


COLUMNS = (
    Column("sent", lambda group: str(group.requests)),
    Column("ok", lambda group: str(group.ok)),
    Column("failed", _failed),
    Column("TTFT p50", lambda group: _p50(group.ttft_s)),
    Column("p90", lambda group: _p90(group.ttft_s)),
    Column("p99", lambda group: _p99(group.ttft_s), always=False),
    Column("TPOT p50", lambda group: _p50(group.tpot_s)),
    Column("p90", lambda group: _p90(group.tpot_s), always=False),
    Column("latency p50", lambda group: _p50(group.latency_s), always=False),
    Column("p90", lambda group: _p90(group.latency_s), always=False),
    Column("tok/s", lambda group: f"{group.output_tokens_per_s:.1f}"),
    Column("good", lambda group: _share(group.goodput)),
)
RIGHT = Column("right", lambda group: _share(group.exact_match))


def render(report: Report, width: int = WIDE) -> RenderableType:
    """The report as a table for a terminal of ``width`` columns, with a summary below it."""
    columns = [column for column in COLUMNS if column.always or width >= WIDE]
    if report.total.all.exact_match is not None:
        columns.append(RIGHT)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column.name, justify="right")
    rows = [(model, breakdown.all) for model, breakdown in report.variants.items()]
    summary = [("warm", report.total.warm), ("cold", report.total.cold), ("all", report.total.all)]
    for name, group in rows:
        table.add_row(Text(name), *(column.cell(group) for column in columns))
    table.add_section()
    for name, part in summary:
        if part is not None:
            table.add_row(
                Text(name), *(column.cell(part) for column in columns), style="bold" if name == "all" else None
            )
    return Lines(table, *_notes(report))


def duration(seconds: float) -> str:
    """Three digits, or all of a large number, with a unit."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def _p50(spread: Distribution | None) -> str:
    return "–" if spread is None else duration(spread.p50)


def _p90(spread: Distribution | None) -> str:
    return "–" if spread is None else duration(spread.p90)


def _p99(spread: Distribution | None) -> str:
    return "–" if spread is None else duration(spread.p99)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _notes(report: Report) -> list[Text]:
    total = report.total.all
    lines = [
        Text(
            f"{report.offered_per_s:.2f} requests/s offered, {total.requests_per_s:.2f} answered, "
            f"{total.goodput_per_s:.2f} good (SLO: {_slo(report)}), over {duration(report.window_s)}; "
            "times count from the intended start"
        )
    ]
    fairness = report.fairness
    if len(report.variants) > 1 and fairness.ttft is not None and fairness.worst_to_median_ttft_p90 is not None:
        lines.append(
            Text(
                f"fairness between variants: TTFT index {fairness.ttft:.2f} (1 is equal), "
                f"slowest variant's TTFT p90 is {fairness.worst_to_median_ttft_p90:.1f} times the median variant's"
            )
        )
    for reason, count in total.errors.items():
        told = total.told.get(reason)
        lines.append(Text(f"{count} failed: {reason}" + (f", the first: {told[:_TOLD]}" if told else ""), style="red"))
    if total.aborted:
        lines.append(Text(f"{total.aborted} cut off when the replay was stopped", style="yellow"))
    lines += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    return lines


def _slo(report: Report) -> str:
    limits = {"TTFT": report.slo.ttft_s, "TPOT": report.slo.tpot_s}
    given = [f"{name} ≤ {duration(limit)}" for name, limit in limits.items() if limit is not None]
    return ", ".join(given) or "none given"
