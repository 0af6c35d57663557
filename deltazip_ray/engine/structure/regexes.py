"""Rejects regular expressions whose nested repetitions, which multiply, expand to too much."""

import re

from deltazip_ray.errors import InvalidRequest

MOST_REPETITIONS = 10_000
# It must not backtrack: Python's `re` keeps the interpreter from the steps until it is done.
# As in ECMAScript, the first `]` ends a class.
_PART = re.compile(r"\\.|\[(?:\\.|[^\]\\])*+\]?|\{[0-9]*+,?[0-9]*+\}|.", re.DOTALL)
_COUNT = re.compile(r"[1-9][0-9]{0,8}")  # nine digits are enough to refuse it


def check_regexes(*regexes: str) -> None:
    """Raise InvalidRequest for expressions whose nested repetitions expand to too much together."""
    if sum(map(_repetitions, regexes)) > MOST_REPETITIONS:
        raise InvalidRequest(f"repetitions inside each other make more than {MOST_REPETITIONS}: lower the counts")


def _repetitions(regex: str) -> int:
    """The largest product of nested counts. Loops without a count cost nothing."""
    open_groups = [1]
    last = 1
    for part in _PART.findall(regex):
        if part == "(":
            open_groups.append(1)
            last = 1
        elif part == ")" and len(open_groups) > 1:
            last = open_groups.pop()
        elif len(part) > 2 and part[0] == "{":
            last *= max(map(int, _COUNT.findall(part)), default=0)
        elif part not in "*+?":
            last = 1
        open_groups[-1] = max(open_groups[-1], last)
    return max(open_groups)
