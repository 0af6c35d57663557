"""The tables of docs/serving.md."""

from typing import Any


def page(report: dict[str, Any]) -> str:
    """All of one run; what it did not come to is left out."""
    parts = [caption(report)]
    if "regret" in report:
        parts.append(served(report))
    if "replay" in report:
        parts.append(load(report))
    if "streams" in report:
        parts.append(streams(report["streams"]))
    if "kill" in report:
        parts.append(killed(report))
    return "\n\n".join(parts)


def served(report: dict[str, Any]) -> str:
    """What was served, and how far its answers are from those of the merged weights."""
    codecs = {one["name"]: one for one in report["variants"]}
    lines = ["| model | codec | smaller than the fp16 checkpoint | regret, own weights | base's weights |"]
    lines.append("|---|---|" + "--:|" * 3)
    for model, regret in report["regret"].items():
        made = codecs.get(model)
        cells = [made["codec"], f"{made['ratio']:.2f} ×"] if made else ["–", "–"]
        lines.append("| " + " | ".join([model, *cells, f"{regret['own']:.3f}", f"{regret['base']:.2f}"]) + " |")
    return "\n".join(lines)


def load(report: dict[str, Any]) -> str:
    """The replayed trace, warm and cold apart."""
    lines = ["| requests | answered | tok/s | TTFT p50 | p90 | time per token p50 | p90 |", "|---" + "|--:" * 6 + "|"]
    groups = {kind: report["replay"][kind] for kind in ("all", "warm", "cold")}
    if "first replay" in report:
        groups = {"all, the first time": report["first replay"]["all"]} | groups
    for kind, group in groups.items():
        if group is None:
            continue
        first, each = group["ttft_sent_s"], group["tpot_s"]
        cells = [f"{group['ok']} of {group['requests']}", f"{group['output_tokens_per_s']:,.0f}"]
        cells += [f"{1000 * first[p]:,.0f} ms" for p in ("p50", "p90")]
        cells += [f"{1000 * each[p]:.1f} ms" for p in ("p50", "p90")]
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    if "first replay" in report:
        lines += ["", f"The first time: {steps(report['first replay']['metrics'])}"]
    if "metrics" in report["replay"]:
        lines += ["", f"Then: {steps(report['replay']['metrics'])}"]
    return "\n".join(lines)


def steps(counted: dict[str, float]) -> str:
    """What the engine did for the trace."""
    name = "deltazip_engine_step"
    count = counted[f"{name}_seconds_count"]
    rows, versions = (counted[f"{name}_{what}_sum"] / counted[f"{name}_{what}_count"] for what in ("rows", "versions"))
    each = 1000 * counted[f"{name}_seconds_sum"] / count
    loads = counted["deltazip_engine_load_seconds_count"]
    load = 1000 * counted["deltazip_engine_load_seconds_sum"] / max(loads, 1)
    return (
        f"{count:,.0f} steps of {each:.1f} ms with {rows:.0f} rows of {versions:.1f} models on average; "
        f"{loads:.0f} loads of {load:,.0f} ms."
    )


def streams(runs: list[dict[str, Any]]) -> str:
    """Many clients that stream at once."""
    heads = [
        "streams",
        "step",
        "tok/s",
        "first token p50",
        "last",
        "all silent, at most",
        "a client hears every, p50",
        "p99",
    ]
    heads += ["CPU a token: replica", "router", "proxy"]
    lines = ["| " + " | ".join(heads) + " |", "|--:" * len(heads) + "|"]
    for run in runs:
        first, gap, cpu = run["first_ms"], run["gap_ms"], run["cpu_us_per_token"]
        cells = [str(run["streams"]), f"{run['step_ms']:.1f} ms", f"{run['tokens_per_s']:,.0f}"]
        cells += [f"{first['p50']:.0f} ms", f"{first['max']:.0f} ms", f"{run['silent_ms']:.0f} ms"]
        cells += [f"{gap['p50']:.1f} ms", f"{gap['p99']:.1f} ms"]
        cells += [f"{cpu[name]:.0f} µs" for name in ("replica", "router", "proxy")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def killed(report: dict[str, Any]) -> str:
    """The replica's death and what clients saw of it."""
    kill = report["kill"]
    outcomes = ", ".join(f"{count} {what}" for what, count in kill["outcomes"].items())
    text = (
        f"`kill -9` of the replica under load: {outcomes}; the next answer came after {kill['first_answer_after_s']} s"
    )
    if "regret" in kill:
        text += f"; the largest regret of an answer is {max(one['own'] for one in kill['regret'].values()):.3f}"
    return f"{text}. Exit code after SIGTERM {report['exit_code']}, processes left {report['processes_left']}."


def caption(report: dict[str, Any]) -> str:
    """Shape, machine and stages."""
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["stages_s"].items())
    return (
        f"Shape {report['shape']}, {len(report['variants'])} variants over {report['slots']} slots, "
        f"{report.get('gpu', 'CPU')}, {report['cores']} cores, at `{report['commit'][:12]}`. Stages: {stages}."
    )


def path(*reports: dict[str, Any]) -> str:
    """The way of tokens without a device, behind each front."""
    heads = ["streams", "step", "groups/s", "first token p50", "last", "a client hears every, p50", "p99"]
    heads += ["CPU a token: replica", "router", "proxy"]
    lines = ["| at | " + " | ".join(heads) + " |", "|---" + "|--:" * len(heads) + "|"]
    for report in reports:
        for run in report["runs"]:
            gap, cpu = run["gap_ms"], run["cpu_us_per_token"]
            cells = [f"`{report['commit'][:7]}`, {report['front']}", str(run["streams"]), f"{run['step_ms']:.2f} ms"]
            first = run["first_ms"]
            cells += [f"{run['groups_per_s']:,.0f}", f"{first['p50']:,.0f} ms", f"{first['max']:,.0f} ms"]
            cells += [f"{gap['p50']:.1f} ms", f"{gap['p99']:.1f} ms"]
            cells += [f"{cpu[name]:.0f} µs" for name in ("replica", "router", "proxy")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
