"""The plots of README.md and docs/, from the JSON in benchmarks/results; needs matplotlib, the extra ``plot``.

``python -m benchmarks.tables`` draws them; ``--check`` finds out which are of an earlier commit than their results.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engine_table import STEP_TOKENS, VLLM, limit
from benchmarks.kernels_table import NUMBERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = dict[str, Any]
_LINEARS = ("qkv", "o", "gate_up", "down")
_WAYS = {"beside": "product beside the GEMM", "merged": "GEMM over a merged weight", "fused": "sum in registers"}
_OURS, _LIMIT, _THEIRS = "tab:blue", "black", "tab:orange"


def draw(plot: "Callable[[Report], Figure]", report: Report, path: Path) -> None:
    """Write one plot as SVG, equal results as equal bytes, with the results' commit in it."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):  # text stays text
        plot(report).savefig(path, metadata={"Date": None, "Description": report["commit"]})


def shows(path: Path, report: Report) -> bool:
    """Whether a plot is of the commit that its results are of."""
    return path.exists() and f"<dc:description>{report['commit']}<" in path.read_text()


def engine(report: Report) -> "Figure":
    """What more fine-tunes cost a decode step, and how many tokens a saturated engine makes."""
    figure, (steps, rates) = _panels(1, 2, width=5)
    ours = {n: report[key]["ms"] for n in range(65) if (key := _step_of(report, n)) in report}
    steps.plot(list(ours), list(ours.values()), "o-", color=_OURS, label=f"full fine-tunes, {report['codec']}")
    limits = [limit(report, n, 32 * STEP_TOKENS) for n in ours]
    steps.plot(list(ours), limits, "--", color=_LIMIT, linewidth=1, label="reading it all once at copy speed")
    steps.plot(list(VLLM), [many for _, many, _ in VLLM.values()], "s", color=_THEIRS, label="vLLM, LoRA of rank 16")
    steps.set(title="decode step of 32 requests", xlabel="fine-tunes in the batch", ylabel="ms", ylim=(0, None))
    steps.legend(fontsize=8)
    places = range(len(VLLM))
    made = [report.get(f"{n}.saturated", {}).get("tokens_per_s", 0) for n in VLLM]
    rates.bar([x - 0.2 for x in places], made, 0.4, color=_OURS, label="full fine-tunes")
    rates.bar([x + 0.2 for x in places], [rate for *_, rate in VLLM.values()], 0.4, color=_THEIRS, label="vLLM, LoRA")
    rates.set(title="saturated, 256 running", ylabel="output tokens/s", xlabel="fine-tunes in the batch")
    rates.set_xticks(list(places), ["base alone", *map(str, list(VLLM)[1:])])
    rates.legend(fontsize=8)
    return figure


def products(report: Report) -> "Figure":
    """How fast the grouped product reads deltas, against the speed of a copy."""
    rows = [r for r in report["results"] if r["kind"] == "product" and r["codec"] not in NUMBERS]
    figure, panels = _panels(2, len(_LINEARS))
    for line, versions in zip(panels, (8, 32), strict=True):
        for axes, linear in zip(line, _LINEARS, strict=True):
            mine = [r for r in rows if r["linear"] == linear and r["segments"].startswith(f"{versions}x")]
            for codec in dict.fromkeys(r["codec"] for r in mine):
                points = [(_rows(r), r["share_of_copy_bandwidth"]) for r in mine if r["codec"] == codec]
                axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=3, label=codec)
            _by_rows(axes)
            axes.set(title=f"{linear}, {versions} versions", xlabel="rows of each version", ylim=(0, 1.1))
        line[0].set_ylabel("deltas read / copy speed")
    panels[0][-1].legend(fontsize=7)
    return figure


def long_segments(report: Report) -> "Figure":
    """What a prompt of one version costs against the base's GEMM alone, by its length."""
    figure, panels = _panels(2, len(_LINEARS))
    rows = [r for r in report["results"] if "+" not in r["segments"]]
    for line, codec in zip(panels, ("int2", "int4"), strict=True):
        for axes, linear in zip(line, _LINEARS, strict=True):
            mine = [r for r in rows if r["linear"] == linear and r["codec"] == codec]
            for way, label in _WAYS.items():
                points = [(r["rows"], r["seconds"] / r["reference"]) for r in mine if r["kind"] == way]
                if points:
                    axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=3, label=label)
            _by_rows(axes)
            axes.set(title=f"{linear}, {codec}", xlabel="rows", ylim=(0.9, 3.1))
        line[0].set_ylabel("time / base GEMM alone")
    panels[0][-1].legend(fontsize=7)
    return figure


def _panels(down: int, across: int, width: float = 3.6) -> "tuple[Figure, Sequence[Any]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * across, 3.2 * down), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(down, across)
    return figure, panels


def _by_rows(axes: "Axes") -> None:
    """A panel over numbers of rows, with the limit at 1."""
    axes.axhline(1, color=_LIMIT, linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()


def _step_of(report: Report, versions: int) -> str:
    """The key of the time of a step of 32 requests: the whole measurement, or else that of decodes alone."""
    whole = f"{versions}.step_32"
    return whole if whole in report else f"{versions}.decodes_32"


def _rows(row: Report) -> int:
    return int(row["segments"].split("x")[1])
