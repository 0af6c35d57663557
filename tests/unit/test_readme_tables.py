"""The tables of README and docs are those of the measured results and of the settings."""

import subprocess
import sys
from pathlib import Path

from deltazip_ray.cli.settings import all_settings, as_markdown
from deltazip_ray.config import AppConfig

ROOT = Path(__file__).parents[2]


def test_pages_show_the_measured_results() -> None:
    checked = subprocess.run([sys.executable, "-m", "benchmarks.tables", "--check"], cwd=ROOT, check=False)
    assert checked.returncode == 0, "run: python -m benchmarks.tables"


def test_the_page_of_settings_has_all_of_them() -> None:
    page = as_markdown(list(all_settings(AppConfig)))
    assert (ROOT / "docs/settings.md").read_text() == page, "run: deltazip settings --markdown > docs/settings.md"
    assert "| `engine.slots` | `8` | deltas on the device at once |" in page
    assert "| `node_store.breaker.failures` | `3` |" in page
    assert "| `base` | required |" in page


def test_readme_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    links = [part.split(")")[0] for part in readme.split("](")[1:]]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
