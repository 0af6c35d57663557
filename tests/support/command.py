"""The ``deltazip`` command in this process."""

import contextlib
import io
import json
from typing import Any

import pytest

from deltazip_ray.cli.app import app
from deltazip_ray.cli.console import run


def deltazip(*args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run(lambda: app(list(map(str, args))))
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def scores(*args: object) -> dict[str, Any]:
    """What ``deltazip eval`` says in JSON."""
    code, out, err = deltazip("eval", *args, "--json")
    assert code == 0, err
    told: dict[str, Any] = json.loads(out)
    return told
