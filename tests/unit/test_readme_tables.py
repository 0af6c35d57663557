"""The tables of README and docs/engine.md are those of the measured results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_pages_show_the_measured_results() -> None:
    checked = subprocess.run([sys.executable, "-m", "benchmarks.tables", "--check"], cwd=ROOT, check=False)
    assert checked.returncode == 0, "run: python -m benchmarks.tables"


def test_readme_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    links = [part.split(")")[0] for part in readme.split("](")[1:]]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
