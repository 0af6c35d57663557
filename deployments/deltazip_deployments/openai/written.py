"""Encodes answers as JSON, long ones off the event loop."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

_LONG = 64


async def written(document: Callable[[], Any], *, long: bool) -> bytes:
    """The JSON of what ``document`` returns, encoded in another thread if it may be ``long``."""
    if not long:
        return _dumps(document()).encode()
    return await asyncio.to_thread(lambda: "".join(_pieces(document())).encode())


def _pieces(value: Any) -> Iterator[str]:
    """The encoding in many short calls of the encoder, as each call holds the GIL until it is done."""
    if isinstance(value, list) and value:
        for index, one in enumerate(value):
            yield "," if index else "["
            yield from [_dumps(one)] if len(value) > _LONG else _pieces(one)
        yield "]"
    elif isinstance(value, dict) and value:
        for index, (name, one) in enumerate(value.items()):
            yield f"{',' if index else '{'}{_dumps(name)}:"
            yield from _pieces(one)
        yield "}"
    else:
        yield _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
