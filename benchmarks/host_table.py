"""The tables of what the host spends on a step and at a start, and of what drawing takes on the device."""

from typing import Any

_STAGES = {
    "digest": "of the base",
    "attention": "import and workspaces",
    "base": "read straight to the device",
    "slots and KV cache": "allocation",
    "warm-up": "a prefill and a mixed step of the base, which compile its kernels",
    "codecs": "kernels of `engine.warm_codecs`",
    "graphs": "decodes of every size, of the base and over these codecs",
}
"""What an engine does at its start, in order."""


def host(report: dict[str, Any]) -> str:
    """CPU time of a step by stage, in milliseconds."""
    stages = list(report["host"][0]["us"])
    lines = ["| draws | running | " + " | ".join(stages) + " |", "|---|--:|" + "--:|" * len(stages)]
    for row in report["host"]:
        cells = [f"{row['us'][stage] / 1e3:.2f}" for stage in stages]
        lines.append(f"| {row['kind']} | {row['running']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def start(report: dict[str, Any]) -> str:
    """Seconds of an engine's start by stage."""
    found = report["start_seconds"]
    lines = ["| stage | what | s |", "|---|---|--:|"]
    for stage, what in _STAGES.items():
        lines.append(f"| `{stage}` | {what} | {f'{found[stage]:.1f}' if stage in found else '–'} |")
    return "\n".join(lines)


def host_by_thread(report: dict[str, Any]) -> str:
    """CPU time of a decode step by thread, in milliseconds, by versions and requests."""
    found = {}
    for key, value in report.items():
        versions, _, what = key.partition(".")
        if what.startswith("decodes_"):
            found[value["requests"], int(versions)] = value
    threads = list(next(iter(found.values()))["host_ms"])
    heads = ["requests", "versions", "time of a step", *threads, "all CPU time"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "--:|" * len(heads)]
    for (requests, count), value in sorted(found.items()):
        spent = value["host_ms"]
        cells = [f"{ms:.2f}" for ms in (*spent.values(), sum(spent.values()))]
        lines.append(f"| {requests} | {count} | {value['ms']:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def split(report: dict[str, Any]) -> str:
    """What lending slots brings, and what a version waits for its own meanwhile."""
    lines = ["| split | blocks of the cache | tokens/s | first tokens of 8 versions | preempted for these |"]
    lines.append("|---|--:|--:|--:|--:|")
    for name in ("fixed", "moving"):
        found = report[name]
        first, *_, last = found["first_token_s"]
        cells = [f"{found['kv_blocks']:,}", f"{found['tokens_per_s']:,.0f}", f"{first:.2f} to {last:.2f} s"]
        lines.append(f"| {name} | " + " | ".join([*cells, str(found["preempted"])]) + " |")
    return "\n".join(lines)


def sampling(report: dict[str, Any]) -> str:
    """Device time of drawing, in milliseconds."""
    kinds = [name for name in report["ms"][0] if name != "rows"]
    lines = ["| rows | " + " | ".join(kinds) + " |", "|--:|" + "--:|" * len(kinds)]
    lines += [f"| {row['rows']} | " + " | ".join(f"{row[name]:.2f}" for name in kinds) + " |" for row in report["ms"]]
    return "\n".join(lines)
