"""A report on the terminal."""

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deltazip_loadgen.report import Group, Report
from deltazip_loadgen.stats import Distribution

COLUMNS = (
    *("sent", "ok", "failed"),
    *("TTFT p50", "p90", "p99"),
    *("TPOT p50", "p90"),
    *("latency p50", "p90"),
    *("tok/s", "good", "right"),
)


def render(report: Report) -> RenderableType:
    """The report as a table with a summary below it."""
    table = Table(title="Replay", title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for model, breakdown in report.variants.items():
        _row(table, escape(model), breakdown.all)
    table.add_section()
    if report.total.warm is not None:
        _row(table, "warm", report.total.warm)
    if report.total.cold is not None:
        _row(table, "cold", report.total.cold)
    _row(table, "all", report.total.all, style="bold")
    return Lines(table, *_notes(report))


def _row(table: Table, name: str, group: Group, style: str | None = None) -> None:
    failed = group.requests - group.ok - group.aborted
    table.add_row(
        name,
        str(group.requests),
        str(group.ok),
        f"[red]{failed}[/red]" if failed else "0",
        *_seconds(group.ttft_s, "p50", "p90", "p99"),
        *_seconds(group.tpot_s, "p50", "p90"),
        *_seconds(group.latency_s, "p50", "p90"),
        f"{group.output_tokens_per_s:.1f}",
        _share(group.goodput),
        _share(group.exact_match),
        style=style,
    )


def _seconds(spread: Distribution | None, *fields: str) -> list[str]:
    return ["–" if spread is None else duration(getattr(spread, field)) for field in fields]


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    return f"{seconds * 1000:.3g} ms" if abs(seconds) < 0.9995 else f"{seconds:#.3g} s"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _notes(report: Report) -> list[Text]:
    total = report.total.all
    lines = [
        Text(
            f"{report.offered_per_s:.2f} requests/s offered, {total.requests_per_s:.2f} answered, "
            f"{total.goodput_per_s:.2f} within the SLO ({_slo(report)}), over {duration(report.window_s)}; "
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
    lines += [Text(f"{count} failed: {reason}", style="red") for reason, count in total.errors.items()]
    if total.aborted:
        lines.append(Text(f"{total.aborted} cut off when the replay was stopped", style="yellow"))
    lines += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    return lines


def _slo(report: Report) -> str:
    limits = {"TTFT": report.slo.ttft_s, "TPOT": report.slo.tpot_s}
    given = [f"{name} ≤ {duration(limit)}" for name, limit in limits.items() if limit is not None]
    return ", ".join(given) or "none given"
