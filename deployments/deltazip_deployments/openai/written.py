"""JSON of answers, written beside the event loop where there is much of it."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

_LONG = 64


async def written(document: Callable[[], Any], *, long: bool) -> bytes:
    """The JSON of what ``document`` makes, in another thread where it may be ``long``."""
    if not long:
        return _dumps(document()).encode()
    return await asyncio.to_thread(lambda: "".join(_pieces(document())).encode())


def _pieces(value: Any) -> Iterator[str]:
    """One encoding in many calls of the encoder, none of them long: it keeps the interpreter until it is done."""
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
