"""README and docs show the measured results and the settings as they are, and what they point at is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deltazip_ray.cli.settings import all_settings, as_markdown
from deltazip_ray.config import AppConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_pages_show_the_measured_results() -> None:
    checked = subprocess.run([sys.executable, "-m", "benchmarks.tables", "--check"], cwd=ROOT, check=False)
    assert checked.returncode == 0, "run: python -m benchmarks.tables"


def test_the_page_of_settings_has_all_of_them() -> None:
    page = as_markdown(list(all_settings(AppConfig)))
    assert (ROOT / "docs/settings.md").read_text() == page, "run: deltazip settings --markdown > docs/settings.md"
    assert "| `engine.slots` | `8` | deltas on the device at once |" in page
    assert "| `node_store.breaker.failures` | `3` |" in page
    assert "| `base` | required |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_at_is_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert "://" in link or target.exists(), link
        assert not anchor or anchor in _anchors(target.read_text()), link
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(?:Test\w+::)?(\w+))?`", text):
        assert (ROOT / file).is_file(), file
        assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text()) or not name, f"{file}::{name}"


def test_every_page_is_in_an_index() -> None:
    for index, folder in (("README.md", "docs"), ("docs/decisions/README.md", "docs/decisions")):
        text, pages = (ROOT / index).read_text(), (ROOT / folder).glob("*.md")
        assert [page.name for page in pages if page.name != "README.md" and f"{page.name})" not in text] == []


def _anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
