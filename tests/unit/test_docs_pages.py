"""README and docs show the measured results and the settings as they are, and what they point at is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from deltazip_deployments import cli
from deltazip_ray.cli.settings import all_settings, as_markdown
from deltazip_ray.config import AppConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_pages_show_the_measured_results() -> None:
    checked = subprocess.run([sys.executable, "-m", "benchmarks.tables", "--check"], cwd=ROOT, check=False)
    assert checked.returncode == 0, "run: python -m benchmarks.tables"


def test_the_page_of_settings_has_all_of_them() -> None:
    page = as_markdown(list(all_settings(AppConfig)))
    assert (ROOT / "docs/settings.md").read_text() == page, "run: deltazip settings --markdown > docs/settings.md"
    assert "| `engine.slots` | `8` | number of slots: deltas on the device at once |" in page
    assert "| `node_store.breaker.failures` | `3` |" in page
    assert "| `base` | required |" in page
    AppConfig.model_validate(yaml.safe_load(_blocks(page)[0]))


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


def test_settings_that_pages_name_exist() -> None:
    there = {setting.name for setting in all_settings(AppConfig)}
    named = {
        name
        for page in PAGES
        for name in re.findall(r"`((?:engine|store|node_store|router)\.[a-z_.]+)", page.read_text())
    }
    assert len(named) > 40
    assert {name for name in named - there if not name.endswith((".py", ".json"))} == {"node_store.breaker"}


def test_every_page_is_in_an_index() -> None:
    for index, folder in (("README.md", "docs"), ("docs/decisions/README.md", "docs/decisions")):
        text, pages = (ROOT / index).read_text(), (ROOT / folder).glob("*.md")
        assert [page.name for page in pages if page.name != "README.md" and f"{page.name})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_have_the_arguments_that_it_gives_them(page: Path) -> None:
    for line in re.findall(r"^deltazip .*$", "\n".join(_blocks(page.read_text())), re.MULTILINE):
        _parse(shlex.split(line, comments=True)[1:])


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text.replace("\\\n", " "), re.DOTALL | re.MULTILINE)


def _parse(words: list[str]) -> None:
    """As the command line would, but for what the values must be; raises UsageError."""
    command = typer.main.get_command(cli.app)
    while isinstance(command, typer.core.TyperGroup):
        found = command.get_command(typer.Context(command), words[0])
        assert found is not None, f"there is no command {words[0]}"
        command, words = found, words[1:]
    context = typer.Context(command)
    given, rest, _ = command.make_parser(context).parse_args(list(words))
    required = [parameter.name or "" for parameter in command.params if parameter.required]
    assert (rest, [name for name in required if not given.get(name)]) == ([], []), command.name


def _anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
