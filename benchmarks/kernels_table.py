"""The tables of ``docs/kernels.md``, from what ``python -m deltazip_kernels.bench --json FILE`` measured."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
_EIGHT_B = ("qkv", "o", "gate_up", "down")
NUMBERS = ("raw", "low_rank")
"""Codecs that keep numbers instead of codes."""
_ONCE = ("plan", "quantize", "rms_norm_quantize", "silu_mul_quantize")


def tables(data: dict[str, Any]) -> dict[str, str]:
    """All of them by the names of their markers."""
    results: list[Row] = data["results"]
    products = [row for row in results if row["kind"] == "product"]
    linears = [row for row in products if row["linear"] in _EIGHT_B]
    packed = [row for row in linears if row["codec"] not in NUMBERS]
    many = {f"{versions}x{rows}" for versions in (8, 32) for rows in (1, 4, 16)}
    return {
        "machine": _machine(data),
        "busy": shares([row for row in packed if row["segments"] not in many]),
        "numbers": shares([row for row in linears if row["codec"] in NUMBERS]),
        "others": shares([row for row in products if row["linear"] not in _EIGHT_B]),
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


def layers(rows: Sequence[Row], bandwidth: float) -> str:
    """Microseconds of a decoder layer, and what of it the deltas add."""
    lines = ["| | without deltas | with them | they add | copying their bytes |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        times = (row["reference"], row["seconds"], row["seconds"] - row["reference"], row["bytes"] / bandwidth)
        lines.append(f"| {row['segments']} | " + " | ".join(f"{1e6 * seconds:.0f}" for seconds in times) + " |")
    return "\n".join(lines)


def long_tables(data: dict[str, Any]) -> dict[str, str]:
    """Those of ``python -m deltazip_kernels.bench --long``."""
    steps = [row for row in data["results"] if "+" in row["segments"]]
    return {"long-steps": long_steps(steps), "long-machine": _machine(data)}


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
    """Microseconds of what is launched once a step or an input."""
    lines = []
    for kind in _ONCE:
        times = [f"{r['linear']} {r['rows']} rows {r['seconds'] * 1e6:.1f} us" for r in rows if r["kind"] == kind]
        lines.append(f"- {kind}: " + ", ".join(time.strip() for time in times))
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
