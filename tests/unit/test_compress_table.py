"""The tables of the compressor's benchmark add up."""

from typing import Any

from benchmarks.compress_table import memory, stages

REPORT: dict[str, Any] = {
    "commit": "0123456789abcdef",
    "machine": "GPU",
    "layers": 2,
    "options": {"target_bits": 2.0},
    "seconds": 100.0,
    "stages": {"solving": 90.0, "packing": 0.5, "digests": 0.25, "the rest": 9.25},
    "memory": {
        "peak": 3_000_000_000,
        "peaks": {"solving": 3_000_000_000, "packing": 1_000_000_000, "digests": 0, "the rest": 0},
        "two_blocks_of_both": 1_500_000_000,
        "calibration_states": 1_000_000_000,
    },
}


def test_small_stages_go_together() -> None:
    lines = stages(REPORT).splitlines()
    assert lines[2:4] == ["| solving | 90.0 | 3.00 |", "| the rest | 10.0 | |"]
    assert lines[4] == "| **together, at most** | **100.0** | **3.00** |"


def test_the_bound_is_compared_with_what_was_found() -> None:
    assert "| bound: both together | 2.50 |" in memory(REPORT)
    assert "**3.00**, missed" in memory(REPORT)
    assert "**3.00**, kept" in memory(REPORT | {"memory": REPORT["memory"] | {"two_blocks_of_both": 2_000_000_000}})
