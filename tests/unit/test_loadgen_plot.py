"""Series behind the plot, and that the plot holds what was measured."""

import re
from pathlib import Path

import numpy as np
import pytest

from deltazip_loadgen import Record, summarize
from deltazip_loadgen.plot import plot
from deltazip_loadgen.series import BINS, bin_edges, rate, token_rate, under_way


def record(at_s: float, model: str = "m", outcome: str = "ok", tier: str | None = "device") -> Record:
    return Record.model_validate(
        {
            "index": 0,
            "model": model,
            "endpoint": "chat",
            "intended_s": at_s,
            "sent_s": at_s,
            "arrivals_s": (at_s + 0.1, at_s + 1.1),
            "end_s": at_s + 1.2,
            "outcome": outcome,
            "output_tokens": 6,
            "tier": tier,
        }
    )


@pytest.mark.parametrize("last_s", [0.01, 1.0, 59.9, 3000.0, 1e6])
def test_bins_are_few_and_cover_everything(last_s: float) -> None:
    edges = bin_edges([record(last_s)])
    assert len(edges) <= BINS + 2
    assert edges[0] == 0
    assert edges[-1] > last_s + 1.2
    assert np.diff(edges) == pytest.approx(edges[1])


def test_rates_are_per_second() -> None:
    edges = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    assert rate([0.1, 0.2, 1.7], edges).tolist() == [4, 0, 0, 2]
    # Six tokens in two groups, at 0.1 s and 1.1 s.
    assert token_rate([record(0.0)], edges).tolist() == [6, 0, 6, 0]
    # One from 0 to 1.2 s, one from 0.75 to 1.95 s.
    assert under_way([record(0.0), record(0.75)], edges) == pytest.approx([1, 1.5, 1.4, 0.9])


@pytest.mark.parametrize("count", [0, 1, 200])
def test_a_png_for_any_number_of_records(tmp_path: Path, count: int) -> None:
    tiers = ("device", "host", None)
    records = [record(i / 10, f"variant-{i % 30}", "ok" if i % 7 else "timeout", tiers[i % 3]) for i in range(count)]
    path = tmp_path / "p.png"
    plot(records, summarize(records), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def test_the_name_decides_the_format(tmp_path: Path) -> None:
    plot([], summarize([]), tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_one_request_is_seen(tmp_path: Path) -> None:
    records = [record(0.0, tier="disk")]
    plot(records, summarize(records), tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    (curve,) = re.findall(r'<path d="([^"]+)" clip-path[^>]+stroke: #d55e00', drawn)
    heights = {line.split()[2] for line in curve.strip().splitlines()}
    assert len(heights) == 2, "from none to all"
