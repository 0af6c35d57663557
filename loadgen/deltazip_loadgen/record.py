"""What is kept of every request. All times are seconds after the start of the replay."""

import json
from typing import Literal

from pydantic import Field

from deltazip_loadgen.trace import Endpoint, Frozen

Outcome = Literal[
    "ok",
    "http_error",  # a status other than 200
    "connect",  # no connection
    "timeout",  # no connection or no complete answer in the time allowed
    "disconnected",  # the connection broke before the answer was complete
    "truncated",  # the stream ended in good order, but without its last event
    "stream_error",  # the server reported an error inside the stream
    "malformed",  # not an event stream, or events that are not what the endpoint promises
    "aborted",  # the replay was stopped while the request was under way
]

Warmth = Literal["warm", "cold"]


class Record(Frozen):
    """One request and its answer.

    Two clocks: from the *intended* start, which is what a user feels and which a slow server or client cannot
    hide (no coordinated omission), and from the moment it was *sent*, which is the server's share.
    """

    index: int = Field(ge=0, description="position in the trace, from 0")
    model: str
    endpoint: Endpoint
    tags: dict[str, str] = Field(default_factory=dict)
    intended_s: float = Field(description="when the trace says that it starts")
    sent_s: float = Field(description="when it did start, before a connection was made")
    arrivals_s: tuple[float, ...] = Field((), description="arrival of each group of tokens, the first first")
    end_s: float = Field(description="end of the answer or of the attempt")
    outcome: Outcome
    status: int | None = Field(None, description="HTTP status, when there was an answer")
    error: str | None = Field(None, description="error body or reason, cut to 2000 characters")
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = Field(None, description="as counted by the server")
    output_tokens: int | None = Field(None, description="as counted by the server")
    tier: str | None = Field(None, description="x-deltazip-tier: where the delta was when the request came")
    version: str | None = Field(None, description="x-deltazip-version")
    request_id: str | None = Field(None, description="x-request-id")
    expected: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the answer is complete."""
        return self.outcome == "ok"

    @property
    def reason(self) -> str | None:
        """In short why the request failed; None when it did not, or was cut off."""
        if self.outcome in ("ok", "aborted"):
            return None
        return f"http_error {self.status}" if self.outcome == "http_error" else self.outcome

    @property
    def told(self) -> str:
        """What the answer says of the failure: the message of an OpenAI error body, or all of it."""
        try:
            return str(json.loads(self.error or "")["error"]["message"])
        except (ValueError, TypeError, LookupError):
            return self.error or ""

    @property
    def warmth(self) -> Warmth | None:
        """Warm when the delta was on the device, cold when it was not; None when the server did not say."""
        if self.tier is None:
            return None
        return "warm" if self.tier == "device" else "cold"

    @property
    def lag_s(self) -> float:
        """How late this client was: the server has no part in it."""
        return self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token from the intended start."""
        return self.arrivals_s[0] - self.intended_s if self.arrivals_s else None

    @property
    def ttft_sent_s(self) -> float | None:
        """Time to first token from the actual start."""
        return self.arrivals_s[0] - self.sent_s if self.arrivals_s else None

    @property
    def latency_s(self) -> float:
        """Time to the end of the answer from the intended start."""
        return self.end_s - self.intended_s

    @property
    def latency_sent_s(self) -> float:
        """Time to the end of the answer from the actual start."""
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None below two tokens or when the server did not count."""
        if self.output_tokens is None or self.output_tokens < 2 or not self.arrivals_s:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.output_tokens - 1)

    @property
    def stall_s(self) -> float | None:
        """The longest wait between two groups of tokens; None below two groups."""
        if len(self.arrivals_s) < 2:
            return None
        return max(later - earlier for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False))

    @property
    def correct(self) -> bool | None:
        """Whether a complete answer is the expected one, outer white space aside; None when nothing was expected."""
        if self.expected is None or not self.ok:
            return None
        return self.text.strip() == self.expected.strip()
