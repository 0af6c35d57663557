"""The tables of docs/compression.md from the JSON that ``benchmarks.compress_speed`` writes."""

from typing import Any

LEAST = 0.01
"""Share of the whole below which a stage goes into the last row."""


def page(report: dict[str, Any]) -> str:
    """Both tables."""
    return f"{stages(report)}\n\n{memory(report)}"


def stages(report: dict[str, Any]) -> str:
    """Seconds and largest memory of each stage, in Markdown."""
    lines = ["| stage | s | GB on the GPU |", "|---|--:|--:|"]
    peaks, rest = report["memory"]["peaks"], 0.0
    for name, seconds in report["stages"].items():
        if seconds < LEAST * report["seconds"] or name == "the rest":
            rest += seconds
        else:
            lines.append(f"| {name} | {seconds:.1f} | {peaks[name] / 1e9:.2f} |")
    lines.append(f"| the rest | {rest:.1f} | |")
    lines.append(f"| **together, at most** | **{report['seconds']:.1f}** | **{report['memory']['peak'] / 1e9:.2f}** |")
    return "\n".join([*lines, "", _caption(report)])


def memory(report: dict[str, Any]) -> str:
    """What was to be kept, and what was found."""
    found = report["memory"]
    blocks, states = found["two_blocks_of_both"] / 1e9, found["calibration_states"] / 1e9
    bound = blocks + states
    verdict = "kept" if found["peak"] / 1e9 <= bound else "missed"
    lines = ["| | GB |", "|---|--:|"]
    lines.append(f"| 2 × (one block of the base + one of the fine-tune), as stored | {blocks:.2f} |")
    lines.append(f"| calibration states of both models | {states:.2f} |")
    lines.append(f"| bound: both together | {bound:.2f} |")
    lines.append(f"| **largest memory of the GPU** | **{found['peak'] / 1e9:.2f}**, {verdict} |")
    return "\n".join(lines)


def _caption(report: dict[str, Any]) -> str:
    options = report["options"]
    goal = f"{options['target_bits']:g} bits a weight" if "target_bits" in options else "int2"
    return (
        f"{report['layers']} of the shape's blocks, head and embedding, random weights, {goal}; "
        f"{report['machine']}, at `{report['commit'][:12]}`."
    )
