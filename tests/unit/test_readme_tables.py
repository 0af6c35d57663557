"""README's tables are those of the measured results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_shows_the_measured_results() -> None:
    checked = subprocess.run([sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], check=False)
    assert checked.returncode == 0, "run: python benchmarks/tables.py"


def test_readme_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    links = [part.split(")")[0] for part in readme.split("](")[1:]]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
