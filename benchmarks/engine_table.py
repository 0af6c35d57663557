"""The tables of the engine's figures, for README.md and docs/engine.md."""

from typing import Any

# vLLM 0.26.0 on the same kind of machine, in an earlier run; milliseconds and output tokens a second.
VLLM = {
    0: ("base", 5.2, 5.94, 10_950),
    8: ("8 LoRAs, rank 16", 9.3, 10.0, 7_900),
    32: ("32 LoRAs, rank 16", None, 19.2, 5_680),
}
KINDS = ("base GEMM", "delta", "attention", "norms and activation", "rest", "gaps")


def figures(report: dict[str, Any]) -> str:
    """Step times and throughput beside the memory's limit and vLLM's LoRAs."""
    heads = ["step, 8 requests", "step, 32 requests", "its limit", "saturated", "prompts"]
    heads += ["vLLM's", "its step, 8", "its step, 32", "its saturated"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" + "|--:" * 5 + "|---" + "|--:" * 3 + "|"]
    for count, (name, few, many, rate) in VLLM.items():
        mine = "base alone" if count == 0 else f"{count} full fine-tunes, {report['codec']}"
        cells = [_ms(report, f"{count}.step_8"), _ms(report, f"{count}.step_32"), f"{limit(report, count):.1f} ms"]
        cells += [_rate(report, f"{count}.{what}") for what in ("saturated", "prefill")]
        theirs = [name, f"{few} ms" if few else "–", f"{many} ms", f"{rate:,} tok/s"]
        lines.append("| " + " | ".join([mine, *cells, *theirs]) + " |")
    return "\n".join(lines)


def limit(report: dict[str, Any], versions: int) -> float:
    """Milliseconds of reading weights, keys and values of 32 requests and ``versions`` deltas at copy speed."""
    parts = report["limits_ms"]
    return float(parts["weights"] + parts["cache"] + versions * parts["delta"])


def growth(report: dict[str, Any]) -> str:
    """The step of 32 requests by the number of versions that share it."""
    counts = sorted(int(key.split(".")[0]) for key in report if key.endswith(".step_32"))
    heads = "| versions | " + " | ".join(map(str, counts)) + " |"
    steps = [f"{report[f'{n}.step_32']['ms']:.2f}" for n in counts]
    ratios = [f"{report[f'{n}.step_32']['ms'] / limit(report, n):.2f}" for n in counts]
    rows = ["| step, ms | " + " | ".join(steps) + " |", "| times its limit | " + " | ".join(ratios) + " |"]
    return "\n".join([heads, "|---|" + "--:|" * len(counts), *rows])


def breakdown(report: dict[str, Any]) -> str:
    """Where the time of a step of 32 requests goes, in milliseconds."""
    counts = sorted(int(key.split(".")[0]) for key in report if key.endswith(".profile_32"))
    lines = ["| versions | " + " | ".join(KINDS) + " | whole step |", "|---|" + "--:|" * (len(KINDS) + 1)]
    for count in counts:
        parts = report[f"{count}.profile_32"]
        cells = [f"{parts.get(kind, 0.0):.2f}" for kind in (*KINDS, "whole step")]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def own_figures(report: dict[str, Any]) -> str:
    """Step times and throughput of one report beside the memory's limit."""
    heads = ["versions", "step, 8 requests", "step, 32 requests", "its limit", "saturated", "prompts"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * 5 + "|"]
    for count in sorted(int(key.split(".")[0]) for key in report if key.endswith(".step_32")):
        cells = [_ms(report, f"{count}.step_8"), _ms(report, f"{count}.step_32"), f"{limit(report, count):.1f} ms"]
        cells += [_rate(report, f"{count}.{what}") for what in ("saturated", "prefill")]
        lines.append("| " + " | ".join([str(count), *cells]) + " |")
    return "\n".join(lines)


def gemm(report: dict[str, Any]) -> str:
    """The base's products, ours and torch's, in microseconds."""
    kinds = ["bfloat16, torch", "bfloat16, ours", "fp8, torch", "fp8, ours"]
    lines = ["| linear | rows | " + " | ".join(kinds) + " |", "|---|--:|" + "--:|" * len(kinds)]
    for name, by_rows in report["microseconds"].items():
        for rows, found in by_rows.items():
            cells = [f"{found[kind]:.1f}" if kind in found else "–" for kind in kinds]
            lines.append("| " + " | ".join([name.replace("|", "\\|"), rows, *cells]) + " |")
    return "\n".join(lines)


def fp8_quality(report: dict[str, Any]) -> str:
    """What a base in fp8 costs trained fine-tunes."""
    ways = list(next(iter(report["tasks"].values())))[1:]
    lines = ["| fine-tune | its exact match | " + " | ".join(ways) + " |", "|---|--:|" + "--:|" * len(ways)]
    for name, found in report["tasks"].items():
        cells = [f"{found[way]['exact_match']:.1%}, {found[way]['kl']:.0e}" for way in ways]
        lines.append("| " + " | ".join([name, f"{found['fine-tune']['exact_match']:.1%}", *cells]) + " |")
    return "\n".join(lines)


def _rate(report: dict[str, Any], key: str) -> str:
    return f"{report[key]['tokens_per_s']:,.0f} tok/s" if key in report else "–"


def _ms(report: dict[str, Any], key: str) -> str:
    return f"{report[key]['ms']:.2f} ms" if key in report else "–"
