"""Rejects regular expressions whose nested repetitions, which multiply, expand to too much."""

import re

from deltazip_ray.errors import InvalidRequest

MOST_REPETITIONS = 10_000
_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)


def check_regex(regex: str) -> None:
    """Raise InvalidRequest for an expression whose nested repetitions expand to too much."""
    if (count := _repetitions(regex)) > MOST_REPETITIONS:
        raise InvalidRequest(
            f"repetitions inside each other make {count} at most, more than {MOST_REPETITIONS}: lower the counts"
        )


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
            last *= max(int(count) for count in re.findall(r"\d+", part))
        elif part not in "*+?":
            last = 1
        open_groups[-1] = max(open_groups[-1], last)
    return max(open_groups)
