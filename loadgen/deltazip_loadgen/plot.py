"""A report's picture: four panels in one PNG. Needs matplotlib, which the extra ``plot`` brings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltazip_loadgen.errors import PlotUnavailable
from deltazip_loadgen.record import Record
from deltazip_loadgen.report import Report
from deltazip_loadgen.series import Array, bin_edges, rate, token_rate, under_way
from deltazip_loadgen.stats import Distribution
from deltazip_loadgen.tables import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
WARM, COLD, UNKNOWN = "#0072B2", "#D55E00", "#555555"
TTFT, LATENCY = "#3A87C0", "#B5508A"
ANSWERS, FAILED, BACKGROUND = "#009E73", "#CC3311", "#C4C4C4"
MAX_VARIANTS = 20
LEGEND: dict[str, Any] = {"fontsize": 9, "loc": "best", "framealpha": 0.85, "edgecolor": "none"}


def check_plotting() -> None:
    """Raise :class:`PlotUnavailable` when matplotlib is missing: better before a replay than after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotUnavailable("--plot needs matplotlib; install it: pip install 'deltazip-ray[plot]'") from error


_FORMATS = {".svg": "svg", ".pdf": "pdf"}


def plot(records: Sequence[Record], report: Report, path: Path) -> None:
    """Draw ``records`` into a PNG, or an SVG or PDF by the path's name; raises :class:`PlotUnavailable`."""
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)
    if records:
        _first_token(panels[0, 0], records, report.slo.ttft_s)
        _per_variant(panels[0, 1], report)
        edges = bin_edges(records)
        _requests(panels[1, 0], records, edges)
        _tokens(panels[1, 1], records, edges)
    for panel in panels.flat:
        panel.grid(visible=True, alpha=0.25, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    total = report.total.all
    failed = total.requests - total.ok - total.aborted
    name = report.run.trace if report.run else "replay"
    models = f"{len(report.variants)} model{'s' if len(report.variants) != 1 else ''}"
    figure.suptitle(
        f"{name}: {total.requests} requests to {models} in {duration(report.window_s)}, "
        f"{failed} failed, {total.output_tokens_per_s:.0f} output tokens/s",
        fontsize=12,
    )
    figure.savefig(path, format=_FORMATS.get(path.suffix, "png"), dpi=110)


def _first_token(panel: "Axes", records: Sequence[Record], limit_s: float | None) -> None:
    """TTFT, cumulative, apart for warm and cold, and the limit that was set."""
    for name, warmth, color in (("warm", "warm", WARM), ("cold", "cold", COLD), ("tier unknown", None, UNKNOWN)):
        samples = np.sort([r.ttft_s for r in records if r.ok and r.ttft_s is not None and r.warmth == warmth])
        if samples.size:
            shares = np.arange(samples.size + 1) / samples.size
            label = f"{name} (n={samples.size}, p50 {duration(float(np.median(samples)))})"
            panel.step([samples[0], *samples], shares, where="post", color=color, label=label, linewidth=1.8)
    if limit_s is not None:
        panel.axvline(limit_s, color=FAILED, linewidth=1, linestyle="--", label=f"SLO {duration(limit_s)}")
    panel.set(title="Time to first token, from the intended start", xlabel="seconds", ylabel="share of requests")
    panel.set_ylim(0, 1.02)
    _log_seconds(panel)
    _legend(panel)


def _per_variant(panel: "Axes", report: Report) -> None:
    """TTFT and latency of each variant: p50 as a dot, a line to p99 with a tick at p90; busiest first."""
    busiest = sorted(report.variants.items(), key=lambda item: -item[1].all.requests)[:MAX_VARIANTS]
    for row, (_, breakdown) in enumerate(busiest):
        _spread(panel, row - 0.16, breakdown.all.ttft_s, TTFT)
        _spread(panel, row + 0.16, breakdown.all.latency_s, LATENCY)
    names = [f"{_short(model)} ({breakdown.all.requests})" for model, breakdown in busiest]
    panel.set_yticks(range(len(names)), names, fontsize=8 if len(names) > 10 else 9)
    panel.invert_yaxis()
    left_out = len(report.variants) - len(busiest)
    more = f" (the busiest {MAX_VARIANTS}; {left_out} more)" if left_out else ""
    panel.set(title=f"Per variant{more}: p50 ●, p90 |, line to p99", xlabel="seconds")
    _log_seconds(panel)
    # Any variant may be without an answer, so the legend has marks of its own. It stands below the axis, beside
    # the axis' label: there is no free corner among twenty variants.
    marks = [panel.plot([], [], "o", color=color, markersize=5)[0] for color in (TTFT, LATENCY)]
    place: dict[str, Any] = {"loc": "upper right", "bbox_to_anchor": (1.0, -0.06), "ncols": 2}
    panel.legend(marks, ["TTFT", "latency"], fontsize=9, frameon=False, **place)


def _spread(panel: "Axes", row: float, spread: Distribution | None, color: str) -> None:
    if spread is None:
        return
    panel.plot([spread.p50, spread.p99], [row, row], color=color, linewidth=1.5, alpha=0.6)
    panel.plot(spread.p90, row, "|", color=color, markersize=8, markeredgewidth=1.8)
    panel.plot(spread.p50, row, "o", color=color, markersize=5)


def _requests(panel: "Axes", records: Sequence[Record], edges: Array) -> None:
    """Intended starts, completions and failures over time."""
    intended = rate([record.intended_s for record in records], edges)
    answered = rate([record.end_s for record in records if record.ok], edges)
    failed = rate([record.end_s for record in records if not record.ok], edges)
    panel.stairs(intended, edges, fill=True, color=BACKGROUND, label="intended starts")
    if failed.any():
        panel.stairs(failed, edges, fill=True, color=FAILED, alpha=0.75, label="failed or cut off")
    panel.stairs(answered, edges, color=ANSWERS, linewidth=1.6, label="complete answers")
    panel.set(title="Requests", xlabel="seconds since the start", ylabel="requests/s")
    panel.set_ylim(bottom=0)
    panel.set_xlim(0, edges[-1])
    _legend(panel)


def _tokens(panel: "Axes", records: Sequence[Record], edges: Array) -> None:
    """Output tokens over time, above the number of requests under way."""
    right = panel.twinx()
    right.stairs(under_way(records, edges), edges, fill=True, color=BACKGROUND, label="requests under way (right)")
    right.set_ylim(bottom=0)
    right.set_ylabel("requests")
    right.spines["top"].set_visible(False)
    panel.stairs(token_rate(records, edges), edges, color=ANSWERS, linewidth=1.6, label="output tokens/s")
    panel.set(title="Output tokens and requests under way", xlabel="seconds since the start", ylabel="tokens/s")
    panel.set_ylim(bottom=0)
    panel.set_xlim(0, edges[-1])
    # The right axes lie above the left ones by default, and their area would hide the line.
    panel.set_zorder(right.get_zorder() + 1)
    panel.patch.set_visible(False)
    areas, names = right.get_legend_handles_labels()
    lines, more_names = panel.get_legend_handles_labels()
    panel.legend(lines + areas, more_names + names, **LEGEND)


def _log_seconds(panel: "Axes") -> None:
    """A logarithmic x axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _legend(panel: "Axes") -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(**LEGEND)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"
