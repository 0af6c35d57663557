"""Server-sent events, decoded as the bytes arrive.

Only what OpenAI-compatible servers send is kept: the ``data`` of each event. Comments and other fields are
skipped. (WHATWG HTML, "Server-sent events", the event stream format.)
"""

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventDecoder:
    """Feed it chunks in order; it gives the data of each event that the chunk completed."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """Data of the events that end in ``chunk``; chunks may be cut anywhere, also inside a character."""
        buffer = self._rest + chunk
        # A "\r" at the end may be the first half of "\r\n".
        held = len(buffer) - 1 if buffer.endswith(b"\r") else len(buffer)
        *lines, rest = _LINE_END.split(buffer[:held])
        self._rest = rest + buffer[held:]
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: bytes) -> str | None:
        if not line:
            if not self._data:
                return None
            event, self._data = "\n".join(self._data), []
            return event
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", errors="replace"))
        return None
