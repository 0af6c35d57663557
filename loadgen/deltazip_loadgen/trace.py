"""The trace format: JSON lines, a header and then one request a line, in order of time.

A trace says what a client population does, never what a server answers. It explains itself: the header
holds the seed and the generator's parameters, from which the same bytes can be made again.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from deltazip_loadgen.errors import LoadgenError, TraceInvalid, describe

FORMAT: Literal["deltazip-trace/1"] = "deltazip-trace/1"

Endpoint = Literal["chat", "completion"]


class Frozen(BaseModel):
    """Immutable, and strict about unknown keys and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Message(Frozen):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class TraceHeader(Frozen):
    """The first line of a trace."""

    format: Literal["deltazip-trace/1"] = FORMAT
    seed: int | None = Field(None, description="of the generator; absent when the trace was not generated")
    generator: dict[str, JsonValue] = Field(default_factory=dict, description="parameters that made the trace")
    requests: int | None = Field(None, ge=0, description="how many follow; a file with another number is refused")


class TraceRequest(Frozen):
    """One request: when it starts, what it asks for, and whom."""

    at_s: float = Field(ge=0, description="intended start, seconds after the start of the trace")
    model: str = Field(min_length=1)
    endpoint: Endpoint
    messages: tuple[Message, ...] | None = Field(None, min_length=1, description="for chat")
    prompt: str | None = Field(None, description="for completion")
    max_tokens: int = Field(ge=1)
    temperature: float = Field(0.0, ge=0)
    seed: int | None = Field(None, description="sampling seed that is sent along")
    tags: dict[str, str] = Field(default_factory=dict, description="carried into the record, not sent")
    expected: str | None = Field(None, description="the right answer, compared with the text; not sent")

    @model_validator(mode="after")
    def _prompt_fits_endpoint(self) -> Self:
        if self.endpoint == "chat" and (self.messages is None or self.prompt is not None):
            raise ValueError("a chat request needs `messages` and no `prompt`")
        if self.endpoint == "completion" and (self.prompt is None or self.messages is not None):
            raise ValueError("a completion request needs `prompt` and no `messages`")
        return self


class TraceFile:
    """A trace on disk, read line by line and as often as it is iterated; never whole in memory."""

    def __init__(self, path: Path) -> None:
        """Reads the header only; raises :class:`TraceInvalid`."""
        self.path = path
        self.header = self._read_header()

    def __iter__(self) -> Iterator[TraceRequest]:
        """The requests; raises :class:`TraceInvalid` with the line's number at the first bad line."""
        count, at_s = 0, 0.0
        lines = read_lines(self.path, TraceInvalid)
        next(lines)
        for number, line in lines:
            request = parse_line(TraceRequest, line, f"{self.path}:{number}", TraceInvalid)
            if request.at_s < at_s:
                raise TraceInvalid(
                    f"{self.path}:{number}: at_s {request.at_s} is earlier than the line before it ({at_s}); "
                    "sort the trace by at_s"
                )
            count, at_s = count + 1, request.at_s
            yield request
        if self.header.requests is not None and count != self.header.requests:
            raise TraceInvalid(
                f"{self.path} holds {count} requests where its header says {self.header.requests}; "
                "it was cut off or edited: make it again, or correct `requests` in the header"
            )

    def _read_header(self) -> TraceHeader:
        for number, line in read_lines(self.path, TraceInvalid):
            return parse_line(TraceHeader, line, f"{self.path}:{number} (header)", TraceInvalid)
        raise TraceInvalid(f'{self.path} is empty; the first line must be a header such as {{"format": "{FORMAT}"}}')


def write_trace(path: Path, header: TraceHeader, requests: Iterable[TraceRequest]) -> None:
    """Write a trace; ``path`` appears only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(header.model_dump_json(exclude_none=True) + "\n")
        for request in requests:
            file.write(request.model_dump_json(exclude_defaults=True) + "\n")
    partial.replace(path)


Line = TypeVar("Line", bound=BaseModel)


def read_lines(path: Path, error: type[LoadgenError]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a JSON-lines file, without their ends; ``error`` when the file cannot be read."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip(b"\r\n")
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}; check the path") from reason


def parse_line(kind: type[Line], line: bytes, where: str, error: type[LoadgenError]) -> Line:
    """One line as a model, without any conversion of types; ``error`` says where and why it is wrong."""
    try:
        return kind.model_validate_json(line, strict=True)
    except ValidationError as reason:
        raise error(f"{where}: {describe(reason)}") from reason
