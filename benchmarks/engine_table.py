"""The tables of the engine's figures, for README.md and docs/engine.md."""

from collections.abc import Iterator
from typing import Any

# By full fine-tunes, or LoRAs of rank 16: milliseconds of a step of 8 and of 32 requests, and output tokens a second
# saturated. vLLM 0.26.0's are from an earlier run on the same kind of machine.
VLLM = {0: (5.2, 5.94, 10_950), 8: (9.3, 10.0, 7_900), 32: (None, 19.2, 5_680)}
GOALS = {0: (4.7, 5.2, 11_500), 8: (8.8, 9.2, 9_000), 32: (None, 19.0, 6_500)}
STEP_TOKENS, DECODE_TOKENS = 512 + 136 / 2, 256 + 80 / 2
"""Tokens of a request's context, in the middle of what ``step`` and ``decodes`` measure."""
_KINDS = ("base GEMM", "delta", "attention", "norms and activation", "rest", "gaps", "whole step")


def figures(report: dict[str, Any]) -> str:
    """Step times and throughput beside their goals, the memory's limit and vLLM's LoRAs."""
    lines = ["| | | found | goal | | its limit | vLLM |", "|---|---|--:|--:|---|--:|--:|"]
    for versions in GOALS:
        name = f"{versions} full fine-tunes, {report['codec']}; vLLM: {versions} LoRAs" if versions else "base alone"
        for row in _against_goals(report, versions):
            lines.append("| " + " | ".join([name, *row]) + " |")
            name = ""
    return "\n".join([*lines, "", f"Measured at `{report['commit'][:12]}`."])


def _against_goals(report: dict[str, Any], versions: int) -> Iterator[list[str]]:
    """What was measured over so many versions, a row for each goal."""
    *steps, rate = zip(GOALS[versions], VLLM[versions], strict=True)
    for requests, (goal, theirs) in zip((8, 32), steps, strict=True):
        if goal is not None and (found := report.get(f"{versions}.step_{requests}")):
            least = limit(report, versions, requests * STEP_TOKENS)
            met = "met" if found["ms"] <= goal else "missed"
            yield [
                f"step of {requests} requests",
                f"{found['ms']:.2f} ms",
                f"≤ {goal} ms",
                met,
                f"{least:.1f} ms",
                f"{theirs} ms",
            ]
    if f"{versions}.saturated" in report:
        met = "met" if report[f"{versions}.saturated"]["tokens_per_s"] >= rate[0] else "missed"
        yield [
            "saturated",
            _rate(report, f"{versions}.saturated"),
            f"≥ {rate[0]:,} tok/s",
            met,
            "",
            f"{rate[1]:,} tok/s",
        ]


def headline(report: dict[str, Any]) -> str:
    """The two figures at the top of README.md; 64 slots were measured once (docs/engine.md)."""
    delta_gb = report["limits_ms"]["delta"] * report["limits_ms"]["bandwidth"] / 1e12
    base, eight = (report[f"{versions}.saturated"]["tokens_per_s"] for versions in (0, 8))
    return (
        f"- **64 full fine-tunes of an 8B model on one H200**, {delta_gb:.2f} GB each "
        "beside the base; as a checkpoint each takes 16 GB ([measured](docs/engine.md#more-versions-more-requests)).\n"
        f"- **Eight of them in every batch: {eight / base:.0%} of the throughput of the base alone** "
        f"({eight:,.0f} of {base:,.0f} tokens a second)."
    )


def steps_in_fp8(report: dict[str, Any]) -> str:
    """A sentence for README.md."""
    few, many = (report[f"8.step_{requests}"]["ms"] for requests in (8, 32))
    return (
        "With the base in fp8 (`engine.base_dtype: fp8`) a step of eight fine-tunes takes "
        f"{few:.1f} ms with 8 requests and {many:.1f} ms with 32."
    )


def own_figures(report: dict[str, Any]) -> str:
    """Step times and throughput of one report beside the memory's limit."""
    heads = ["versions", "step, 8 requests", "step, 32 requests", "its limit", "saturated"]
    lines = ["| " + " | ".join(heads) + " |", "| " + "--:|" * len(heads)]
    counts = sorted({int(key.split(".")[0]) for key in report if ".step_" in key})
    lines += ["| " + " | ".join([str(count), *_figures(report, count)]) + " |" for count in counts]
    return "\n".join(lines)


def _figures(report: dict[str, Any], count: int) -> list[str]:
    steps = [_ms(report, f"{count}.step_{requests}") for requests in (8, 32)]
    return [*steps, f"{limit(report, count, 32 * STEP_TOKENS):.1f} ms", _rate(report, f"{count}.saturated")]


def limit(report: dict[str, Any], versions: int, tokens: float) -> float:
    """Milliseconds of reading weights, ``versions`` deltas and the keys and values of ``tokens`` at copy speed."""
    parts = report["limits_ms"]
    return float(parts["weights"] + versions * parts["delta"] + tokens / (32 * STEP_TOKENS) * parts["cache"])


def growth(report: dict[str, Any]) -> str:
    """Milliseconds of a decode step by versions and requests, and how many times the memory's limit that is."""
    found: dict[tuple[bool, int], dict[int, str]] = {}
    for key, value in report.items():
        versions, _, what = key.partition(".")
        if what.startswith(("decodes_", "zipf_")):
            requests, ms = value["requests"], value["ms"]
            times = ms / limit(report, value.get("versions", int(versions)), requests * DECODE_TOKENS)
            row = found.setdefault((what.startswith("zipf_"), int(versions)), {})
            row[requests] = f"{ms:.2f} ({times:.2f} ×)"
    columns = sorted({requests for row in found.values() for requests in row})
    lines = ["| versions | " + " | ".join(f"{n} requests" for n in columns) + " |", "| " + "--:|" * (1 + len(columns))]
    for (zipf, count), row in sorted(found.items()):
        cells = [row.get(n, "–") for n in columns]
        lines.append("| " + " | ".join([f"{count}, by Zipf" if zipf else str(count), *cells]) + " |")
    return "\n".join(lines)


def clocks(report: dict[str, Any]) -> str:
    """Medians of the GPU's clock and power beside each run, and how often power held the clock back."""
    lines = ["| versions | run | MHz | W | held back |", "| --:|---|--:|--:|--:|"]
    for key, value in report.items():
        found = value.get("clocks", {}) if isinstance(value, dict) else {}
        if found.get("samples"):
            versions, _, run = key.partition(".")
            cells = [versions, run.replace("_", " of "), *(f"{found[what]:,.0f}" for what in ("mhz", "watts"))]
            lines.append("| " + " | ".join([*cells, f"{found['capped']:.0%}"]) + " |")
    return "\n".join(lines)


def breakdown(report: dict[str, Any]) -> str:
    """Where the device's time of decode steps goes, in milliseconds; in brackets what reading takes at copy speed."""
    heads = ["versions", "requests", *_KINDS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "--:|" * len(heads)]
    keys = (key.split(".profile_") for key in report if ".profile_" in key)
    for versions, requests in sorted((int(versions), int(requests)) for versions, requests in keys):
        found, limits = report[f"{versions}.profile_{requests}"], report["limits_ms"]
        tokens = requests * found["context"]
        least = {
            "base GEMM": limits["weights"],
            "delta": versions * limits["delta"],
            "attention": tokens / (32 * STEP_TOKENS) * limits["cache"],
            "whole step": limit(report, versions, tokens),
        }
        cells = [f"{found.get(kind, 0):.2f}" + (f" ({least[kind]:.1f})" if least.get(kind) else "") for kind in _KINDS]
        lines.append("| " + " | ".join([str(versions), str(requests), *cells]) + " |")
    return "\n".join(lines)


def prompts(report: dict[str, Any]) -> str:
    """Where the device's time of steps with prompts goes, in milliseconds."""
    kinds = ("base with delta", *_KINDS)
    lines = ["| versions | " + " | ".join(kinds) + " |", "|--:|" + "--:|" * len(kinds)]
    for key, found in report.items():
        if key.endswith(".prompts"):
            cells = [f"{found.get(kind, 0):.1f}" for kind in kinds]
            lines.append("| " + " | ".join([key.removesuffix(".prompts"), *cells]) + " |")
    return "\n".join(lines)


def gemm(report: dict[str, Any]) -> str:
    """The base's products, ours and torch's, in microseconds, as far as there is one of ours."""
    kinds = ["bfloat16, torch", "bfloat16, ours", "fp8, torch", "fp8, ours"]
    lines = ["| linear | rows | " + " | ".join(kinds) + " |", "|---|--:|" + "--:|" * len(kinds)]
    for name, by_rows in report["microseconds"].items():
        for rows, found in by_rows.items():
            if "fp8, ours" not in found:
                continue
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
