"""docs/failures.md: every row names tests, and those exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "failures.md").read_text()


def test_every_row_names_a_test_that_exists() -> None:
    rows = [line for line in DOCS.splitlines() if line.startswith("|") and not re.match(r"\|(-|\s*fault)", line)]
    assert len(rows) > 30
    for row in rows:
        assert re.search(r"`tests/\S+::\w+`", row.split("|")[-2]), row


def test_tests_that_are_named_exist() -> None:
    for file, name in re.findall(r"`(tests/\S+)::(\w+)`", DOCS):
        assert re.search(rf"^(async )?(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
