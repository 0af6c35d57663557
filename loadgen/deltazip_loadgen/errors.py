"""Errors of the load generator; each message says what is wrong and what to do next.

LoadgenError
├── TraceInvalid      a trace file or one of its lines cannot be used
├── PoolInvalid       a prompt pool cannot be used
├── SettingInvalid    generator or replay settings contradict themselves or cannot be parsed
└── PlotUnavailable   the optional plotting library is not installed

A request that fails is no error here: it is a record with an outcome.
"""

from pydantic import ValidationError


class LoadgenError(Exception):
    """Root of the errors that the load generator raises on purpose."""


class TraceInvalid(LoadgenError):
    """A trace file, or one of its lines, cannot be used."""


class PoolInvalid(LoadgenError):
    """A prompt pool, or one of its lines, cannot be used."""


class SettingInvalid(LoadgenError):
    """Settings contradict themselves or cannot be parsed."""


class PlotUnavailable(LoadgenError):
    """The optional plotting library is not installed."""


def describe(error: ValidationError) -> str:
    """All complaints of a validation in one line, each with the field it is about."""
    parts = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        field = ".".join(str(step) for step in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{field}: {message}" if field else message)
    return "; ".join(parts)
