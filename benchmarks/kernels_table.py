"""The tables of ``docs/kernels.md``: ``python benchmarks/kernels_table.py benchmarks/results/kernels-h200.json``."""

import json
import sys
from pathlib import Path
from typing import Any


def shares(results: list[dict[str, Any]]) -> str:
    """Microseconds and share of the copy bandwidth, for each codec and linear."""
    columns = list(dict.fromkeys(r["segments"] for r in results))
    lines = ["| codec | linear | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for codec, linear in dict.fromkeys((r["codec"], r["linear"]) for r in results):
        cells = []
        for column in columns:
            found = [r for r in results if (r["codec"], r["linear"], r["segments"]) == (codec, linear, column)]
            cells.append(
                f"{found[0]['seconds'] * 1e6:.1f} ({found[0]['share_of_copy_bandwidth']:.2f})" if found else ""
            )
        lines.append(f"| {codec} | {linear} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def long_segments(results: list[dict[str, Any]], codec: str) -> str:
    """Total time over that of the base GEMM alone: beside / merged."""
    mine = [r for r in results if r["codec"] == codec]
    rows = list(dict.fromkeys(r["rows"] for r in mine))
    lines = ["| linear | " + " | ".join(f"{n} rows" for n in rows) + " |", "|---|" + "---|" * len(rows)]
    for linear in dict.fromkeys(r["linear"] for r in mine):
        ratio = {(r["kind"], r["rows"]): r["seconds"] / r["reference"] for r in mine if r["linear"] == linear}
        cells = [f"{ratio['beside', n]:.2f} / {ratio['merged', n]:.2f}" for n in rows]
        lines.append(f"| {linear} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    data = json.loads(Path(sys.argv[1]).read_text())
    results = data["results"]
    of = {kind: [r for r in results if r["kind"] == kind] for kind in {r["kind"] for r in results}}
    print(f"{data['machine']}, torch {data['torch']}, triton {data['triton']}, commit {data['commit'][:12]}, ")
    print(f"copy bandwidth {data['copy_bandwidth'] / 1e12:.2f} TB/s\n")
    eight_b = {"qkv", "o", "gate_up", "down"}
    print(shares([r for r in of["product"] if r["linear"] in eight_b and r["codec"] not in {"raw", "low_rank"}]))
    print("\n" + shares([r for r in of["product"] if r["codec"] in {"raw", "low_rank"}]))
    print("\n" + shares([r for r in of["product"] if r["linear"] not in eight_b]))
    print("\n" + shares(of["mixture"]) + "\n")
    print(long_segments(of["beside"] + of["merged"], "int2"))
    for r in of["layer"]:
        times = f"{r['reference'] * 1e6:.0f} us without deltas, {r['seconds'] * 1e6:.0f} us with them"
        limit = r["bytes"] / data["copy_bandwidth"] * 1e6
        print(f"\nlayer, {r['codec']} {r['segments']}: {times}, {limit:.0f} us to copy their bytes")
    for kind in ("plan", "quantize", "rms_norm_quantize", "silu_mul_quantize"):
        times = [f"{r['linear']} {r['rows']} rows {r['seconds'] * 1e6:.1f} us" for r in of.get(kind, [])]
        print(f"\n{kind}: " + ", ".join(times))


if __name__ == "__main__":
    main()
