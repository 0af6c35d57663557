"""The tables of ``docs/kernels.md``, from what ``python -m deltazip_kernels.bench --json FILE`` measured."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
_EIGHT_B = ("qkv", "o", "gate_up", "down")
NUMBERS = ("raw", "low_rank")
"""Codecs that keep numbers instead of codes."""
_ONCE = ("plan", "quantize", "rms_norm_quantize", "silu_mul_quantize")
_GOALS = {"int4": 0.75, "int2": 0.75, "sparse24_int4": 0.75, "int3": 0.60, "sparse24_int2": 0.60, "int1": 0.60}
"""Share of the copy's speed that a packed codec should read at, by codec."""
_SMALL_GOAL = 0.60
"""The same for the smallest linear, ``o``, with eight versions."""
_LONG_GOAL = 1.3
"""Time of a long segment over that of the base's GEMM alone."""
_SPARSE_MARLIN = {
    ("o", "8x1"): 75,
    ("4096x22016", "8x1"): 153,
    ("11008x4096", "8x1"): 116,
    ("4096x22016", "1x512"): 228,
}
"""Microseconds by linear and segments, of an earlier run on the same kind of machine."""


def tables(data: dict[str, Any]) -> dict[str, str]:
    """All of them by the names of their markers."""
    results: list[Row] = data["results"]
    products = [row for row in results if row["kind"] == "product"]
    linears = [row for row in products if row["linear"] in _EIGHT_B]
    packed = [row for row in linears if row["codec"] not in NUMBERS]
    many = [f"{versions}x{rows}" for versions in (8, 32) for rows in (1, 4, 16)]
    return {
        "machine": _machine(data),
        "goals": against_goals(packed, many),
        "busy": shares(with_sums([row for row in packed if row["segments"] not in many], data["copy_bandwidth"])),
        "numbers": shares([row for row in linears if row["codec"] in NUMBERS]),
        "others": others(products),
        "mixtures": shares([row for row in results if row["kind"] == "mixture"]),
        "layers": layers([row for row in results if row["kind"] == "layer"], data["copy_bandwidth"]),
        "once": once(results),
    }


def shares(rows: Sequence[Row]) -> str:
    """Microseconds and shares of the copy's and of reading's speed, for each codec and linear."""
    columns = list(dict.fromkeys(row["segments"] for row in rows))
    lines = ["| codec | linear | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    cells = {(row["codec"], row["linear"], row["segments"]): _share(row) for row in rows}
    for codec, linear in dict.fromkeys((row["codec"], row["linear"]) for row in rows):
        found = [cells.get((codec, linear, column), "") for column in columns]
        lines.append(f"| {codec} | {linear} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def against_goals(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Share of the copy's speed for each codec and linear, bold where it misses its goal."""
    lines = ["| codec | goal | linear | " + " | ".join(columns) + " |", "|---|--:|---|" + "--:|" * len(columns)]
    found = {(row["codec"], row["linear"], row["segments"]): row["share_of_copy_bandwidth"] for row in rows}
    for codec, goal in _GOALS.items():
        for linear in _EIGHT_B:
            cells = [_against(found[codec, linear, column], _goal(codec, linear, column)) for column in columns]
            lines.append(f"| {codec} | {goal:.2f} | {linear} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _goal(codec: str, linear: str, segments: str) -> float:
    return _SMALL_GOAL if linear == "o" and segments.startswith("8x") else _GOALS[codec]


def _against(share: float, goal: float) -> str:
    return f"{share:.2f}" if share >= goal else f"**{share:.2f}**"


def others(products: Sequence[Row]) -> str:
    """Microseconds beside those of Sparse-Marlin's published kernels."""
    codecs = ("sparse24_int4", "int4", "int2")
    lines = [
        f"| linear | segments | Sparse-Marlin | {' | '.join(codecs)} | times faster, sparse24_int4 |",
        "|---|---|" + "--:|" * 5,
    ]
    for (linear, segments), theirs in _SPARSE_MARLIN.items():
        ours = {
            row["codec"]: row["seconds"] * 1e6
            for row in products
            if (row["linear"], row["segments"]) == (linear, segments)
        }
        cells = [f"{ours[codec]:.1f}" for codec in codecs]
        lines.append(f"| {linear} | {segments} | {theirs} | {' | '.join(cells)} | {theirs / ours[codecs[0]]:.1f} |")
    return "\n".join(lines)


def with_sums(rows: Sequence[Row], bandwidth: float) -> list[Row]:
    """``rows``, and behind those of each codec the sums over a layer's linears."""
    out: list[Row] = []
    for codec in dict.fromkeys(row["codec"] for row in rows):
        mine = [row for row in rows if row["codec"] == codec]
        out += mine
        for segments in dict.fromkeys(row["segments"] for row in mine):
            four = [row for row in mine if row["segments"] == segments]
            sums = {key: sum(row[key] for row in four) for key in ("seconds", "reference", "bytes")}
            share = sums["bytes"] / sums["seconds"] / bandwidth
            out.append({**four[0], **sums, "linear": "all four", "share_of_copy_bandwidth": share})
    return out


def layers(rows: Sequence[Row], bandwidth: float) -> str:
    """Microseconds of a decoder layer, and what of it the deltas add."""
    lines = ["| | without deltas | with them | they add | copying their bytes |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        times = (row["reference"], row["seconds"], row["seconds"] - row["reference"], row["bytes"] / bandwidth)
        lines.append(f"| {row['segments']} | " + " | ".join(f"{1e6 * seconds:.0f}" for seconds in times) + " |")
    return "\n".join(lines)


def attention(report: Row) -> str:
    """Microseconds of a layer's attention, decodes and prefills, beside FlashInfer's."""
    kinds = {"flashinfer": "FlashInfer", "triton": "ours", "fp8": "ours, fp8 cache"}
    lines = ["| sequences x tokens | reading keys and values | " + " | ".join(kinds.values()) + " |"]
    lines.append("|---" + "|--:" * (1 + len(kinds)) + "|")
    for stage, note in (("decodes", ""), ("prefills", ", prefill")):
        for name, found in report[stage].items():
            limit = f"{found['limit_us']:.1f}" if "limit_us" in found else ""
            cells = [f"{found[kind]['us']:.1f}" if kind in found else "–" for kind in kinds]
            lines.append("| " + " | ".join([name + note, limit, *cells]) + " |")
    return "\n".join(lines)


def long_tables(data: dict[str, Any]) -> dict[str, str]:
    """Those of ``python -m deltazip_kernels.bench --long``."""
    steps = [row for row in data["results"] if "+" in row["segments"]]
    one = [row for row in data["results"] if row["kind"] == "fused" and "+" not in row["segments"]]
    return {"long": long_segments(one), "long-steps": long_steps(steps), "long-machine": _machine(data)}


def long_segments(rows: Sequence[Row]) -> str:
    """Time of one long segment by the fused kernel over that of the base's GEMM alone, bold above the goal."""
    counts = sorted({row["rows"] for row in rows if row["rows"] >= 512})
    lines = ["| codec | linear | " + " | ".join(f"{n} rows" for n in counts) + " |", "|---|---|" + "--:|" * len(counts)]
    for codec in dict.fromkeys(row["codec"] for row in rows):
        mine = [row for row in rows if row["codec"] == codec]
        for linear in (*_EIGHT_B, "all four"):
            picked = [row for row in mine if linear in (row["linear"], "all four")]
            cells = [_long_ratio([row for row in picked if row["rows"] == n]) for n in counts]
            lines.append(f"| {codec} | {linear} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _long_ratio(rows: Sequence[Row]) -> str:
    ratio = sum(row["seconds"] for row in rows) / sum(row["reference"] for row in rows)
    return f"{ratio:.2f}" if ratio <= _LONG_GOAL else f"**{ratio:.2f}**"


def long_steps(rows: Sequence[Row]) -> str:
    """Total time over that of the base GEMM alone, of several versions in one step: merged / fused."""
    columns = list(dict.fromkeys((row["codec"], row["segments"]) for row in rows))
    titles = [f"{codec}, {segments.replace('+', ' + ')}" for codec, segments in columns]
    lines = ["| linear | " + " | ".join(titles) + " |", "|---|" + "---|" * len(columns)]
    for linear in dict.fromkeys(row["linear"] for row in rows):
        of = {
            (r["codec"], r["segments"], r["kind"]): r["seconds"] / r["reference"] for r in rows if r["linear"] == linear
        }
        cells = [" / ".join(f"{of[*column, kind]:.2f}" for kind in ("merged", "fused")) for column in columns]
        lines.append(f"| {linear} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def once(rows: Sequence[Row]) -> str:
    """Microseconds of what is launched once a step or an input, by rows."""
    mine = [row for row in rows if row["kind"] in _ONCE]
    counts = sorted({row["rows"] for row in mine})
    lines = ["| | columns | " + " | ".join(f"{n} rows" for n in counts) + " |", "|---|--:|" + "--:|" * len(counts)]
    found = {(row["kind"], row["linear"], row["rows"]): f"{row['seconds'] * 1e6:.1f}" for row in mine}
    for kind, columns in dict.fromkeys((row["kind"], row["linear"]) for row in mine):
        cells = [found.get((kind, columns, n), "") for n in counts]
        lines.append(f"| {kind} | {columns} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _machine(data: dict[str, Any]) -> str:
    return (
        f"{data['machine']}, torch {data['torch']}, triton {data['triton']}, copy bandwidth "
        f"{data['copy_bandwidth'] / 1e12:.2f} TB/s, commit `{data['commit'][:12]}`."
    )


def _share(row: Row) -> str:
    shares = [row["share_of_copy_bandwidth"]]
    if row["reference"]:
        shares.append(row["reference"] / row["seconds"])
    return f"{row['seconds'] * 1e6:.1f} ({', '.join(f'{share:.2f}' for share in shares)})"
