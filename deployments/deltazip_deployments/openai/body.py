"""Parses request bodies. Unsupported fields that would change the answer are rejected by name."""

import asyncio
import json
import re
from collections.abc import AsyncIterable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deltazip_deployments.openai.protocol import ChatRequest, CompletionRequest
from deltazip_ray.errors import InvalidRequest

MAX_BODY_BYTES = 4 << 20
"""More than a prompt of a million tokens needs. Parsing 16 MiB of JSON would block the event loop for 0.2 s."""
_THROWN_AWAY_BYTES = 64 << 20
"""Longer bodies are read up to here, so that the client gets the error: answering earlier resets the connection."""
_BODY_TIMEOUT_S = 30.0
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

# Accepted, without any effect on the answer.
_HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# Not supported, or not at this endpoint; values that ask for nothing are accepted.
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}


class InvalidField(InvalidRequest):
    """A request with an invalid field; ``param`` names the field in the answer."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


_Request = TypeVar("_Request", CompletionRequest, ChatRequest)


async def read_request(
    kind: type[_Request], chunks: AsyncIterable[bytes], timeout_s: float = _BODY_TIMEOUT_S
) -> _Request:
    """Read a whole body and parse it.

    Raises InvalidRequest, also for a body that is too long or does not arrive in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            body = await _whole(chunks)
    except TimeoutError:
        raise InvalidRequest(f"the body was not complete after {timeout_s:g} s: send it at once") from None
    return parse_request(kind, body)


async def _whole(chunks: AsyncIterable[bytes]) -> bytes:
    body, size = bytearray(), 0
    async for chunk in chunks:
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            body += chunk
        elif size > _THROWN_AWAY_BYTES:
            break
    if size > MAX_BODY_BYTES:
        raise InvalidRequest(f"the body has more than {MAX_BODY_BYTES} bytes: send a shorter one")
    return bytes(body)


def parse_request(kind: type[_Request], body: bytes) -> _Request:
    """Parse a request body; raises InvalidRequest, which names the field and says what to do."""
    if not body:
        raise InvalidRequest("the body is empty: send JSON, without asking for HTTP/2 (the server drops such a body)")
    try:
        text = body.decode("utf-8-sig")
        data = json.loads(text)
        if _SURROGATE.search(text):
            # Half of a surrogate pair is not a character: tokenizers and answers cannot encode it.
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON in UTF-8: {error}") from error
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        return kind.model_validate(_without_unused(kind, data))
    except ValidationError as error:
        raise _first_problem(error) from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


def _without_unused(kind: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """``data`` without fields that ask for nothing; raises InvalidField for unsupported ones."""
    kept = {}
    for name, value in data.items():
        if name in kind.model_fields:
            kept[name] = value
        elif name in _NEUTRAL:
            if not any(type(value) in _like(unused) and value == unused for unused in _NEUTRAL[name]):
                raise InvalidField(f"{name!r} is not supported here: leave it out", name)
        elif name not in _HARMLESS:
            raise InvalidField(f"unknown field {name[:80]!r}: leave it out", name[:80])
    return kept


def _like(value: Any) -> tuple[type, ...]:
    """Types of JSON values that can equal ``value``: 0 equals 0.0, but not False."""
    return (int, float) if type(value) is int else (type(value),)


def _first_problem(error: ValidationError) -> InvalidField:
    problems = error.errors(include_url=False, include_input=False)
    # If a field is a union, report the problem with the alternative that the value comes closest to.
    field = [one for one in problems if one["loc"][:1] == problems[0]["loc"][:1]]
    problem = max(field, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    # Parts of the location that name the member of a union are nothing that the client wrote.
    parts = [str(part) for part in problem["loc"] if part != "str" and not str(part).startswith("list[")]
    location = [part for part, _ in groupby(parts)]
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return InvalidField(message, _named_first(message))
    return InvalidField(f"{'.'.join(location)}: {message}", location[0])


def _named_first(message: str) -> str | None:
    """The field that a message about several fields begins with."""
    found = re.match(r"'(\w+)'", message)
    return found and found[1]
