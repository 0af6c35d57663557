"""OpenAI answers: whole, and as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from deltazip_deployments.http_errors import error_body
from deltazip_deployments.router.generation import Generation
from deltazip_ray.errors import DeltaZipError


@dataclass(frozen=True)
class Form:
    """What differs between the endpoints."""

    id_prefix: str
    whole: str
    part: str
    message: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None
    closing: dict[str, Any]


COMPLETION = Form(
    id_prefix="cmpl",
    whole="text_completion",
    part="text_completion",
    message=lambda text: {"text": text},
    delta=lambda text: {"text": text},
    opening=None,
    closing={"text": ""},
)
CHAT = Form(
    id_prefix="chatcmpl",
    whole="chat.completion",
    part="chat.completion.chunk",
    message=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    delta=lambda text: {"delta": {"content": text}},
    opening={"delta": {"role": "assistant", "content": ""}},
    closing={"delta": {}},
)


class Answer:
    """Writes one answer in the form of one endpoint."""

    def __init__(self, form: Form, generation: Generation, *, include_usage: bool) -> None:
        self._form = form
        self._generation = generation
        self._include_usage = include_usage
        self._head = {
            "id": f"{form.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": generation.model,
            "system_fingerprint": f"fp_{(generation.version or 'base')[:12]}",
        }

    async def whole(self) -> dict[str, Any]:
        """The complete answer; raises what the generation raises."""
        text = "".join([piece async for piece in self._generation.pieces()])
        choice = {
            "index": 0,
            "logprobs": None,
            "finish_reason": self._generation.finish_reason,
            **self._form.message(text),
        }
        return {"object": self._form.whole, **self._head, "choices": [choice], "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; an error in the middle becomes the last event, without ``[DONE]``."""
        # The head of a piece never changes: writing only the text anew costs a tenth of a whole document.
        before, after = json.dumps(self._event([self._choice(self._form.delta("\0"), None)])).split(json.dumps("\0"))
        if self._form.opening is not None:
            yield _sse(self._event([self._choice(self._form.opening, None)]))
        try:
            async for piece in self._generation.pieces():
                yield f"data: {before}{json.dumps(piece)}{after}\n\n".encode()
        except DeltaZipError as error:
            yield _sse(error_body(error))
            return
        yield _sse(self._event([self._choice(self._form.closing, self._generation.finish_reason)]))
        if self._include_usage:
            yield _sse(self._event([]) | {"usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        event = {"object": self._form.part, **self._head, "choices": choices}
        return event | {"usage": None} if self._include_usage else event

    def _choice(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}

    def _usage(self) -> dict[str, int]:
        prompt, completion = self._generation.prompt_tokens, self._generation.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _sse(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()
