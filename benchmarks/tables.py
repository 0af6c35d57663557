"""Put the tables of README.md and docs/ between their markers and draw their plots, from benchmarks/results.

python -m benchmarks.tables            # rewrite them; plots need matplotlib
python -m benchmarks.tables --check    # exit 1 when they do not show the results
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import compress_table, plots, scheduling, serving_table
from benchmarks.engine_table import (
    breakdown,
    clocks,
    figures,
    fp8_quality,
    gemm,
    growth,
    headline,
    own_figures,
    prompts,
    steps_in_fp8,
)
from benchmarks.host_table import host, host_by_thread, sampling, split, start
from benchmarks.kernels_table import attention, long_tables
from benchmarks.kernels_table import tables as kernel_tables
from benchmarks.kv_table import fp8_cache
from benchmarks.quality import report as quality_report
from benchmarks.tiers_table import goals, ways

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(report: dict[str, Any]) -> str:
    """The demo's table, in Markdown."""
    heads = ["variant", "fine-tune", "delta", "ratio", "right: base", "fine-tune", "served"]
    heads += ["TTFT cold p50", "warm p50", "warm p90"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for row in report["variants"]:
        numbers = [f"{row[key] / 1000:,.0f} kB" for key in ("bytes_finetuned", "bytes_artifact")]
        numbers += [f"{row['ratio']:.2f} ×"]
        numbers += [f"{row[f'exact_match_{who}']:.0%}" for who in ("base", "finetuned", "served")]
        numbers += [_ms(row[f"ttft_{kind}_s"]) for kind in ("cold_p50", "warm_p50", "warm_p90")]
        lines.append("| " + " | ".join([row["name"], *numbers]) + " |")
    return "\n".join([*lines, "", _demo_caption(report)])


def _demo_caption(report: dict[str, Any]) -> str:
    traffic, config = report["traffic"], report["config"]
    commit = f" Measured at `{report['commit'][:12]}`." if "commit" in report else ""
    return (
        f"Codec {config['codec']}; {traffic['requests']} requests to {len(report['variants'])} variants and the base "
        f"at {traffic['requests_per_s']:.0f} a second, {config['replicas']} replicas of {config['slots']} slots on "
        f"{report['machine']['cores']} CPU cores; {traffic['mixed_steps']:.0%} of the steps served several models at "
        "once. *Right* is the exact match of held-out answers: base and fine-tune under `transformers`, the delta over "
        f"HTTP. *Cold*: the delta was not on the device.{commit}"
    )


def render(readme: str, name: str, table: str) -> str:
    """``readme`` with ``table`` between the markers of ``name``."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", readme)


def pages() -> dict[str, dict[str, str]]:
    """By page, its tables by the names of their markers."""
    engine, forms = _read("engine-h200"), _lines("quality")
    tiers = _read("tiers-h200")
    return {
        "README.md": {
            "demo": demo_table(_read("demo")),
            "headline": headline(engine),
            "engine": figures(engine),
            "fp8": steps_in_fp8(_read("engine-h200-fp8")),
        },
        "docs/engine.md": {
            "engine": figures(engine),
            "start": _dated(start, engine),
            "growth": _dated(growth, engine),
            "engine-clocks": _dated(clocks, engine),
            "engine-int4": _dated(own_figures, _read("engine-h200-int4")),
            "engine-64": _dated(growth, _read("engine-h200-64")),
            "breakdown": _dated(breakdown, _read("engine-h200-breakdown")),
            "prompts": prompts(_read("engine-h200-prompts-tried")),
            "fp8-quality": _dated(fp8_quality, _read("engine-fp8-quality")),
            "engine-fp8": _dated(own_figures, _read("engine-h200-fp8")),
            "gemm": _dated(gemm, _read("base-gemm-h200")),
            "host threads": _dated(host_by_thread, engine),
            "split": _dated(split, _read("engine-split-h200")),
            "sampling": _dated(sampling, _read("sampling-h200")),
            "fp8-cache": _dated(fp8_cache, _read("kv-fp8")),
        },
        "docs/scheduling.md": {
            "host": scheduling.host_table(_read("scheduling")),
            "policies": _dated(scheduling.table, _read("scheduling")),
            "engine host": _dated(host, _read("engine-host")),
        },
        "docs/tiers.md": {
            "goals": goals(tiers, _read("tiers-s3-h200-host"), _read("tiers-policy")),
            "ways": ways(tiers),
        },
        "docs/kernels.md": {
            **kernel_tables(_read("kernels-h200")),
            **long_tables(_read("kernels-h200-long")),
            "attention": _dated(attention, _read("attention-h200")),
        },
        "docs/compression.md": {
            "compress": compress_table.page(_read("compress-h200")),
            "allocation": quality_report.allocation(_lines("quality_allocation")),
            "calibration": quality_report.calibration(_lines("quality_calibration")),
        },
        "docs/quality.md": {
            "quality": quality_report.page(forms),
            "tasks": quality_report.by_task(forms),
            "itself": quality_report.page(_lines("quality-itself")),
        },
        "docs/serving.md": {
            "path": serving_table.path(*_read("serving-path")[-2:]),
            **{name: serving_table.page(_read(name)) for name in ("serving-cpu", "serving-h200")},
        },
    }


PLOTS = {
    "engine": (plots.engine, "engine-h200"),
    "kernels-products": (plots.products, "kernels-h200"),
    "kernels-long": (plots.long_segments, "kernels-h200-long"),
}
"""By file in docs, what draws it, and its results."""


def main() -> int:
    """Rewrite or check the pages."""
    checking, stale = "--check" in sys.argv[1:], False
    for name, (plot, results) in PLOTS.items():
        path = ROOT / "docs" / f"{name}.svg"
        if checking:
            stale = stale or not plots.shows(path, _read(results))
        else:
            plots.draw(plot, _read(results), path)
    for page, tables in pages().items():
        path = ROOT / page
        text = wanted = path.read_text()
        for name, table in tables.items():
            wanted = render(wanted, name, table)
        if checking:
            stale = stale or wanted != text
        else:
            path.write_text(wanted)
    return int(stale)


def _dated(table: Callable[[dict[str, Any]], str], report: dict[str, Any]) -> str:
    """``table`` of ``report``, and the commit that was measured."""
    return f"{table(report)}\n\nMeasured at `{report['commit'][:12]}`."


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _lines(name: str) -> list[dict[str, Any]]:
    return quality_report.read(RESULTS / f"{name}.jsonl")


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:,.0f} ms"


if __name__ == "__main__":
    sys.exit(main())
