"""The table of what a cache in fp8 costs, for docs/engine.md."""

from typing import Any


def fp8_cache(report: dict[str, Any]) -> str:
    """Exact match and divergence of each kind of cache."""
    kinds = list(next(iter(report["tasks"].values())))
    lines = ["| fine-tune | " + " | ".join(kinds) + " |", "|---" + "|--:" * len(kinds) + "|"]
    for name, rows in report["tasks"].items():
        cells = [f"{rows[kind]['exact_match']:.1%}, {rows[kind]['kl']:.0e}" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
