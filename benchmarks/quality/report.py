"""The table of docs/quality.md, which ``benchmarks.tables`` puts there, and its plot.

    python -m benchmarks.quality.report benchmarks/results/quality.jsonl docs/quality.svg

Numbers are means over the tasks: scores and ratios arithmetic, divergences geometric. Tasks that the fine-tune itself
has not learned are left out, and forms that were not measured for every other task.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

LEARNED = 0.8
LEAST = 1e-9
"""Nats: a divergence that rounding has left at or below zero counts as this."""
WHOLE, BASE = "fine-tune", "base"
TASKWISE = (
    ("score", WHOLE),
    ("score", "ours, ratio 12"),
    ("KL", "ours, ratio 12"),
    ("KL", "2:4 int2"),
    ("KL", "ours, bytes of 2:4 int2"),
    ("KL", "2:4 int4"),
    ("KL", "ours, bytes of 2:4 int4"),
)
"""What :func:`by_task` shows of which form; the divergence is that on the task."""
MATCHED = ("int3", "int2", "int1")
RULES = {
    "one codec for all": "uniform",
    "the same without descent": "no descent",
    "2:4 of as many bytes for all": "sparse",
    "least output error": "output error",
    "**least KL**": "kl",
}
"""What :func:`allocation` shows, at the bytes of which codecs."""
FAMILIES: tuple[tuple[str, str, str, Callable[[str], bool]], ...] = (
    ("ours, targets", "tab:blue", "o", lambda name: name.startswith("ours") and "for all" not in name),
    ("ours, one codec for all", "tab:cyan", "s", lambda name: name.startswith("ours")),
    ("ours, one codec, no descent", "black", "x", lambda name: name.startswith("no descent")),
    ("rounded deltas", "tab:gray", "v", lambda name: name.startswith("rounded")),
    ("2:4 deltas (DeltaZip)", "tab:red", "D", lambda name: name.startswith("2:4")),
    ("low rank (+ sparse residue)", "tab:olive", "p", lambda name: name.startswith("low rank")),
    ("BitDelta", "tab:purple", "P", lambda name: name == "BitDelta"),
    ("fine-tune itself, GPTQ", "tab:orange", "^", lambda name: name.startswith("GPTQ")),
    ("fine-tune itself, SparseGPT", "tab:brown", "<", lambda name: name.startswith("SparseGPT")),
    ("LoRA, another fine-tune", "tab:green", "*", lambda name: name == "LoRA"),
)


@dataclass(frozen=True)
class Line:
    """One way of keeping a fine-tune, over all tasks."""

    name: str
    bytes_gpu: float
    ratio_gpu: float | None
    ratio_stored: float | None
    score: float
    lost: float
    """Of the fine-tune's mean score over the same tasks, as a share of it."""
    worst: float
    """The largest share that a task loses."""
    kl_task: float
    kl_text: float
    seconds: float


def summarize(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """One line for each way, the largest first; the fine-tune and the base lead."""
    whole = {row["task"]: row["exact_match"] for row in rows if row["variant"] == WHOLE}
    whole = {task: score for task, score in whole.items() if score >= LEARNED}
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["task"] in whole:
            by_name[row["variant"]].append(row)
    lines = [_line(name, group, whole) for name, group in by_name.items() if len(group) == len(whole)]
    return sorted(lines, key=lambda line: (line.name != WHOLE, line.name != BASE, -line.bytes_gpu))


def _line(name: str, rows: Sequence[dict[str, Any]], whole: dict[str, float]) -> Line:
    def ratio(key: str) -> float | None:
        return fmean(row[key] for row in rows) if all(row[key] for row in rows) else None

    def divergence(where: str) -> float:
        return geometric_mean([max(row[where]["kl"], LEAST) for row in rows])

    right = fmean(whole[row["task"]] for row in rows)
    score = fmean(row["exact_match"] for row in rows)
    return Line(
        name=name,
        bytes_gpu=fmean(row["bytes_gpu"] for row in rows),
        ratio_gpu=ratio("ratio_gpu"),
        ratio_stored=ratio("ratio_stored"),
        score=score,
        lost=1 - score / right,
        worst=max(1 - row["exact_match"] / whole[row["task"]] for row in rows),
        kl_task=divergence("on_task"),
        kl_text=divergence("on_text"),
        seconds=fmean(row["compress_s"] for row in rows),
    )


def table(lines: Sequence[Line]) -> str:
    """In Markdown."""
    heads = ["", "MB in GPU memory", "× smaller", "× stored", "score", "lost", "worst task", "KL, task", "KL, text"]
    rows = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for line in lines:
        numbers = [f"{line.bytes_gpu / 1e6:.1f}", *map(_times, (line.ratio_gpu, line.ratio_stored))]
        numbers += [f"{line.score:.1%}", f"{line.lost:.1%}", f"{line.worst:.1%}"]
        numbers += ["0" if line.name == WHOLE else f"{kl:.1e}" for kl in (line.kl_task, line.kl_text)]
        rows.append("| " + " | ".join([line.name, *numbers]) + " |")
    return "\n".join(rows)


def by_task(rows: Sequence[dict[str, Any]]) -> str:
    """Each fine-tune by itself, ours beside 2:4 of as many bytes, in Markdown."""
    forms: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in _measured(rows):
        forms[row["task"]][row["variant"]] = row
    heads = ["", *(f"{what}: {name}" for what, name in TASKWISE)]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for task, found in forms.items():
        cells = [
            f"{found[name]['exact_match']:.1%}" if what == "score" else f"{found[name]['on_task']['kl']:.1e}"
            for what, name in TASKWISE
        ]
        lines.append("| " + " | ".join([task, *cells]) + " |")
    return "\n".join(lines)


def allocation(rows: Sequence[dict[str, Any]]) -> str:
    """What ``benchmarks.quality.allocation`` found: geometric means of the divergences over the tasks, in Markdown."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        # Of 2:4, 4-bit values take 3 bits a weight.
        at = {"sparse24_int4": "int3", "sparse24_int2": "int2"}.get(row["at"])
        found[("sparse", at) if at else (row["rule"], row["at"])].append(row)
    sizes = [fmean(row["ratio"] for row in found["uniform", codec]) for codec in MATCHED]
    heads = ["", *(f"bytes of {codec}, {size:.1f} ×" for codec, size in zip(MATCHED, sizes, strict=True))]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * len(MATCHED) + "|"]
    for label, rule in RULES.items():
        groups = [[row["kl"] for row in found[rule, codec]] for codec in MATCHED]
        cells = [f"{geometric_mean(group):.1e}" if group else "–" for group in groups]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join([*lines, "", f"{rows[0]['machine']}, at `{rows[0]['commit'][:12]}`."])


def calibration(rows: Sequence[dict[str, Any]]) -> str:
    """What ``benchmarks.quality.calibration`` found, over the tasks, in Markdown."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["at"], row["rule"]].append(row)
    lines = ["| | KL: chats | KL: sampled | score: chats | score: sampled |", "|---|--:|--:|--:|--:|"]
    for form in dict.fromkeys(row["at"] for row in rows):
        both = [found[form, source] for source in ("chats", "sampled")]
        cells = [f"{geometric_mean(row['kl'] for row in group):.1e}" for group in both]
        cells += [f"{fmean(row['exact_match'] for row in group):.1%}" for group in both]
        lines.append("| " + " | ".join([form, *cells]) + " |")
    return "\n".join([*lines, "", f"{rows[0]['machine']}, at `{rows[0]['commit'][:12]}`."])


def plot(lines: Sequence[Line], path: Path) -> None:
    """Score and divergence against bytes."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "quality"
    from matplotlib import pyplot

    figure, (scores, divergences) = pyplot.subplots(1, 2, figsize=(13, 5.5))
    left = [line for line in lines if line.name not in (WHOLE, BASE)]
    for label, color, marker, belongs in FAMILIES:
        chosen = [line for line in left if belongs(line.name)]
        if not chosen:
            continue
        left = [line for line in left if line not in chosen]
        sizes = [line.bytes_gpu / 1e6 for line in chosen]
        style = {"color": color, "marker": marker, "label": label, "linestyle": ":" if len(chosen) > 1 else ""}
        scores.plot(sizes, [100 * line.score for line in chosen], **style)
        divergences.plot(sizes, [line.kl_task for line in chosen], **style)
        for line in chosen:
            short = line.name.removeprefix("ours, ").removeprefix("rounded ").removesuffix(" for all")
            divergences.annotate(
                short, (line.bytes_gpu / 1e6, line.kl_task), (4, 3), textcoords="offset points", size=7
            )
    whole = next(line for line in lines if line.name == WHOLE)
    scores.axhline(100 * whole.score, color="black", linewidth=0.8, label=f"fine-tune, {whole.bytes_gpu / 1e6:.0f} MB")
    for axes, title in ((scores, "exact match, %"), (divergences, "KL to the fine-tune on answers, nats a token")):
        axes.set(xscale="log", xlabel="MB in GPU memory, embeddings included", title=title)
        axes.grid(visible=True, which="both", alpha=0.2)
    divergences.set_yscale("log")
    scores.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The table of all results, and where they are from."""
    return f"{table(summarize(_measured(rows)))}\n\n{_source(rows)}"


def main() -> None:
    """Draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("plot", type=Path)
    given = parser.parse_args()
    plot(summarize(_measured(read(given.results))), given.plot)


def read(results: Path) -> list[dict[str, Any]]:
    """The lines of the results."""
    return [json.loads(line) for line in results.read_text().splitlines()]


def _source(rows: Sequence[dict[str, Any]]) -> str:
    return f"{rows[0]['machine']['device']}, at `{rows[0]['commit'][:12]}`."


def _measured(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "variant" in row]


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    main()
