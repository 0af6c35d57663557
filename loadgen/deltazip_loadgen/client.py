"""One request, sent and recorded."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from deltazip_loadgen.connections import Connections
from deltazip_loadgen.options import ReplayOptions
from deltazip_loadgen.record import Outcome, Record
from deltazip_loadgen.sse import EventDecoder
from deltazip_loadgen.trace import TraceRequest

Clock = Callable[[], float]

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
DONE = "[DONE]"
ERROR_CHARS = 2000


class _Failure(Exception):
    """The answer is not what it should be."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome: Outcome = outcome
        self.reason = reason


@dataclass
class _Answer:
    """What has arrived so far, so that a failed request keeps what it got."""

    status: int | None = None
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    arrivals_s: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    done: bool = False


class Exchange:
    """One request's life; ``run`` gives its record and raises nothing but cancellation."""

    def __init__(
        self,
        request: TraceRequest,
        index: int,
        intended_s: float,
        options: ReplayOptions,
        clock: Clock,
        on_first_token: Callable[[], None],
    ) -> None:
        self._request = request
        self._index = index
        self._intended_s = intended_s
        self._options = options
        self._clock = clock
        self._on_first_token = on_first_token
        self._answer = _Answer()
        self._sent_s = 0.0

    async def run(self, connections: Connections) -> Record:
        """Send the request now and follow its stream to the end."""
        self._sent_s = self._clock()
        try:
            async with asyncio.timeout(self._options.timeout_s), connections.lend() as client:
                await self._stream(client)
        except _Failure as failure:
            return self._record(failure.outcome, failure.reason)
        except TimeoutError:
            return self._record("timeout", f"no complete answer within {self._options.timeout_s} s")
        except httpx.ConnectTimeout:
            return self._record("timeout", f"no connection within {self._options.connect_timeout_s} s")
        except httpx.ConnectError as error:
            return self._record("connect", f"no connection: {error}")
        except httpx.DecodingError as error:
            return self._record("malformed", f"cannot decode the body: {error}")
        except httpx.TransportError as error:
            return self._record("disconnected", f"{type(error).__name__}: {error}")
        return self._record("ok", None)

    def aborted(self) -> Record:
        """The record of a request that was cancelled while it ran."""
        return self._record("aborted", "the replay was stopped")

    async def _stream(self, client: httpx.AsyncClient) -> None:
        answer = self._answer
        async with client.stream("POST", PATHS[self._request.endpoint], json=self._body()) as response:
            answer.status, answer.headers = response.status_code, response.headers
            if response.status_code != httpx.codes.OK:
                body = (await response.aread()).decode("utf-8", errors="replace")
                raise _Failure("http_error", body)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise _Failure("malformed", f"not an event stream: {(await response.aread())!r}")
            decoder = EventDecoder()
            async for chunk in response.aiter_bytes():
                now_s = self._clock()
                for event in decoder.feed(chunk):
                    self._event(event, now_s)
        if not answer.done:
            raise _Failure("truncated", f"the stream ended without {DONE}")

    def _body(self) -> dict[str, Any]:
        """What is sent: the request without what is only for the record, streamed and with usage."""
        body = self._request.model_dump(
            mode="json",
            include={"model", "messages", "prompt", "max_tokens", "temperature", "seed"},
            exclude_none=True,
        )
        return body | {"stream": True, "stream_options": {"include_usage": True}} | self._options.extra_body

    def _event(self, data: str, now_s: float) -> None:
        answer = self._answer
        if data == DONE:
            answer.done = True
            return
        try:
            text, finish_reason, usage = _read_event(json.loads(data), self._request.endpoint)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise _Failure("malformed", f"{type(error).__name__}: {error} in event {data}") from error
        if text:
            answer.text.append(text)
            # Events of one chunk arrived together: they are one group.
            if not answer.arrivals_s or answer.arrivals_s[-1] != now_s:
                answer.arrivals_s.append(now_s)
            if len(answer.text) == 1:
                self._on_first_token()
        answer.finish_reason = finish_reason or answer.finish_reason
        answer.usage = usage or answer.usage

    def _record(self, outcome: Outcome, error: str | None) -> Record:
        answer, request = self._answer, self._request
        return Record(
            index=self._index,
            model=request.model,
            endpoint=request.endpoint,
            tags=request.tags,
            intended_s=round(self._intended_s, 6),
            sent_s=round(self._sent_s, 6),
            arrivals_s=tuple(round(at_s, 6) for at_s in answer.arrivals_s),
            end_s=round(self._clock(), 6),
            outcome=outcome,
            status=answer.status,
            error=error and error[:ERROR_CHARS],
            text="".join(answer.text),
            finish_reason=answer.finish_reason,
            prompt_tokens=answer.usage.get("prompt_tokens"),
            output_tokens=answer.usage.get("completion_tokens"),
            tier=answer.headers.get("x-deltazip-tier"),
            version=answer.headers.get("x-deltazip-version"),
            request_id=answer.headers.get("x-request-id"),
            expected=request.expected,
        )


def _read_event(event: Any, endpoint: str) -> tuple[str, str | None, dict[str, int] | None]:
    """(text, finish reason, token counts) of one event; raises _Failure for the server's own errors."""
    if "error" in event:
        raise _Failure("stream_error", json.dumps(event["error"]))
    usage = event.get("usage")
    if usage is not None:
        usage = {key: int(usage[key]) for key in ("prompt_tokens", "completion_tokens")}
    if not event["choices"]:
        return "", None, usage
    choice = event["choices"][0]
    text = choice["delta"].get("content") if endpoint == "chat" else choice["text"]
    finish_reason = choice.get("finish_reason")
    for value in (text, finish_reason):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{value!r} where a string belongs")
    return text or "", finish_reason, usage
