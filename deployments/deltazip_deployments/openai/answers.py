"""OpenAI answers: whole, and as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from deltazip_deployments.http_errors import error_body
from deltazip_deployments.openai.logprobs import TokenText, Told, chat_logprobs, completion_logprobs, prompt_logprobs
from deltazip_deployments.openai.written import written
from deltazip_deployments.text.choices import Choice, Choices
from deltazip_ray.errors import DeltaZipError


@dataclass(frozen=True)
class Form:
    """The differences between the endpoints."""

    id_prefix: str
    whole: str
    part: str
    message: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None
    closing: dict[str, Any]
    logprobs: Callable[[Told, TokenText, int], dict[str, Any]]
    prompt_in_choices: bool
    """Whether ``prompt_logprobs`` are in each choice rather than beside the choices."""


COMPLETION = Form(
    id_prefix="cmpl",
    whole="text_completion",
    part="text_completion",
    message=lambda text: {"text": text},
    delta=lambda text: {"text": text},
    opening=None,
    closing={"text": ""},
    logprobs=completion_logprobs,
    prompt_in_choices=True,
)
CHAT = Form(
    id_prefix="chatcmpl",
    whole="chat.completion",
    part="chat.completion.chunk",
    message=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    delta=lambda text: {"delta": {"content": text}},
    opening={"delta": {"role": "assistant", "content": ""}},
    closing={"delta": {}},
    logprobs=chat_logprobs,
    prompt_in_choices=False,
)


class Answer:
    """Writes one answer in the form of one endpoint."""

    def __init__(self, form: Form, choices: Choices, *, include_usage: bool) -> None:
        self._form = form
        self._choices = choices
        self._asked = choices.asked
        self._include_usage = include_usage
        self._head = {
            "id": f"{form.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self._asked.model,
            "system_fingerprint": f"fp_{(self._asked.version or 'base')[:12]}",
        }

    async def whole(self) -> bytes:
        """The complete answer; raises what the generation raises."""
        outputs = await self._choices.whole()
        return await written(lambda: self._whole(outputs), long=self._tells_logprobs)

    def _whole(self, outputs: Sequence[Choice]) -> dict[str, Any]:
        echoed, prompt = self._echoed(), self._prompt_logprobs()
        choices = []
        for index, made in enumerate(outputs):
            content = self._form.message(made.text) | (prompt if self._form.prompt_in_choices else {})
            logprobs = self._logprobs([*echoed, *made.logprobs], 0)
            choices.append(self._choice(index, content, made.finish_reason, logprobs))
        answer = {"object": self._form.whole, **self._head, "choices": choices, "usage": self._usage()}
        return answer if self._form.prompt_in_choices else answer | prompt

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events; after an error in the middle there is an error event, and no ``[DONE]``."""
        # Only the text of a piece changes: encoding it alone costs a tenth of encoding the whole document.
        heads = [self._event(self._choice(i, self._form.delta("\0"))) for i in range(self._asked.choices)]
        frames = [json.dumps(head).split(json.dumps("\0")) for head in heads]
        echoed = self._echoed()
        for index in range(self._asked.choices):
            if self._form.opening is not None:
                yield _sse(self._event(self._choice(index, self._form.opening)))
            if self._asked.echo is not None:
                event = await written(partial(self._echo_event, index, echoed), long=self._tells_logprobs)
                yield b"data: %b\n\n" % event
        offsets = [sum(len(self._asked.text.token_text(token)) for token, _ in echoed)] * self._asked.choices
        try:
            async with aclosing(self._choices.pieces()) as pieces:
                async for index, piece in pieces:
                    if piece.logprobs:
                        logprobs = self._logprobs(piece.logprobs, offsets[index])
                        yield _sse(self._event(self._choice(index, self._form.delta(piece.text), None, logprobs)))
                        offsets[index] += sum(len(self._asked.text.token_text(token)) for token, _ in piece.logprobs)
                    elif piece.text:
                        yield f"data: {frames[index][0]}{json.dumps(piece.text)}{frames[index][1]}\n\n".encode()
                    if piece.finish_reason is not None:
                        yield _sse(self._event(self._choice(index, self._form.closing, piece.finish_reason)))
        except DeltaZipError as error:
            yield _sse(error_body(error))
            return
        if self._include_usage:
            yield _sse(self._event() | {"usage": self._usage()})
        yield b"data: [DONE]\n\n"

    @property
    def _tells_logprobs(self) -> bool:
        return self._asked.logprobs is not None or self._asked.prompt_logprobs is not None

    def _echo_event(self, index: int, echoed: Told) -> dict[str, Any]:
        content = self._form.delta(self._asked.echo or "")
        return self._event(self._choice(index, content, None, self._logprobs(echoed, 0)))

    def _event(self, *choices: dict[str, Any]) -> dict[str, Any]:
        event = {"object": self._form.part, **self._head, "choices": choices}
        return event | {"usage": None} if self._include_usage else event

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, told: Told, offset: int) -> dict[str, Any] | None:
        """The log-probabilities of tokens; None unless requested."""
        if self._asked.logprobs is None:
            return None
        return self._form.logprobs(told, self._asked.text.token_text, offset)

    def _echoed(self) -> Told:
        """The log-probabilities of an echoed prompt."""
        if self._asked.echo is None or self._asked.logprobs is None:
            return []
        return self._choices.prompt_told(self._asked.logprobs)

    def _prompt_logprobs(self) -> dict[str, Any]:
        """The field ``prompt_logprobs``, if requested."""
        count = self._asked.prompt_logprobs
        if count is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(self._choices.prompt_told(count), self._asked.text.token_text)}

    def _usage(self) -> dict[str, int]:
        prompt, completion = len(self._asked.prompt), self._choices.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _sse(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()
