"""Rooflines of the kernels: ``python benchmarks/kernels_plot.py RESULT.json OUT.svg`` (needs matplotlib)."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

plt.rcParams["svg.fonttype"] = "none"  # text stays text


def main() -> None:
    data = json.loads(Path(sys.argv[1]).read_text())
    products = [r for r in data["results"] if r["kind"] == "product" and r["segments"].startswith("8x")]
    linears = list(dict.fromkeys(r["linear"] for r in products))
    figure, axes = plt.subplots(1, len(linears), figsize=(4 * len(linears), 3.6), sharey=True)
    for axis, linear in zip(axes, linears, strict=True):
        for codec in dict.fromkeys(r["codec"] for r in products):
            mine = [r for r in products if r["linear"] == linear and r["codec"] == codec]
            rows = [int(r["segments"].split("x")[1]) for r in mine]
            axis.plot(rows, [r["bytes"] / r["seconds"] / 1e12 for r in mine], marker="o", markersize=3, label=codec)
        axis.axhline(data["copy_bandwidth"] / 1e12, color="black", linewidth=0.8, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_title(f"{linear}, 8 deltas")
        axis.set_xlabel("rows of each delta")
    axes[0].set_ylabel("TB/s of deltas read (dashed: copy)")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
