"""A small OpenAI-like server with known faults, in a thread and an event loop of its own.

What goes wrong is chosen by the request's ``model``; see the methods of :class:`FaultyServer`. Answers are
words ``w0 w1 …``, one event each, as many as ``max_tokens``.
"""

import asyncio
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Self

EVENT_GAP_S = 0.005
SLOW_S = 0.4
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"


@dataclass
class Seen:
    """A request as the server saw it; ``at_s`` is time.monotonic()."""

    at_s: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class FaultyServer:
    """Use as a context manager; ``url`` is where it listens."""

    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    under_way: int = 0
    most_under_way: int = 0
    connections: int = 0
    crowd: int = 0
    _crowded: asyncio.Event = field(default_factory=asyncio.Event)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *reason: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def freeze(self, seconds: float) -> None:
        """Stop the whole server, all its streams and new connections, as a long garbage collection would."""
        self._loop.call_soon_threadsafe(time.sleep, seconds)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)

    async def _close(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                await self._answer(await self._request(reader), writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> Seen:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:]) if name}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.seen.append(Seen(time.monotonic(), head[0].split()[1], headers, body))
        return self.seen[-1]

    async def _answer(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            fault = getattr(self, "_" + seen.body["model"].replace("-", "_"), None)
            await (fault(seen, writer) if fault else self._stream(seen, writer))
            await writer.drain()
        finally:
            self.under_way -= 1

    async def _stream(
        self,
        seen: Seen,
        writer: asyncio.StreamWriter,
        *,
        words: int | None = None,
        tier: str = "device",
        usage: bool = True,
    ) -> None:
        """A good answer; with ``words`` only its first words, and left unfinished."""
        writer.write(HEAD + f"x-deltazip-tier: {tier}\r\nx-deltazip-version: v1\r\nx-request-id: r1\r\n\r\n".encode())
        chat = seen.path.endswith("/chat/completions")
        if chat:
            send(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        total = seen.body["max_tokens"]
        for i in range(total if words is None else words):
            text = f"w{i} "
            send(writer, {"choices": [{"delta": {"content": text}} if chat else {"text": text}]})
            await writer.drain()
            await asyncio.sleep(EVENT_GAP_S)
        if words is None:
            send(writer, {"choices": [{"finish_reason": "length", **({"delta": {}} if chat else {"text": ""})}]})
            if usage:
                send(writer, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": total, "x": None}})
            end(writer)

    async def _slow_first(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(SLOW_S)
        await self._stream(seen, writer, tier="remote")

    async def _cold(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        await self._stream(seen, writer, tier="host")

    async def _stall(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        """Two words, silence, and the rest."""
        await self._stream(seen, writer, words=2)
        await asyncio.sleep(SLOW_S)
        send(writer, {"choices": [{"delta": {"content": "late"}}]})
        send(writer, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
        end(writer)

    async def _crowd(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        """Nothing for anybody until ``crowd`` requests are under way."""
        if self.under_way == self.crowd:
            self._crowded.set()
        await self._crowded.wait()
        await self._stream(seen, writer)

    async def _hang(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        await self._stream(seen, writer, words=2)
        await asyncio.sleep(60)

    async def _error_500(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        refuse(writer, "500 Internal Server Error", "it broke " + "x" * 5000)

    async def _error_429(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        refuse(writer, "429 Too Many Requests", '{"error": {"message": "queues are full"}}')

    async def _reset_early(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        reset(writer)

    async def _reset_midway(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        await self._stream(seen, writer, words=3)
        await asyncio.sleep(0.1)
        reset(writer)

    async def _close_midway(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        """The connection ends in good order, the chunked body does not."""
        await self._stream(seen, writer, words=3)
        writer.close()

    async def _truncated(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        """The chunked body ends in good order, the stream of events does not."""
        await self._stream(seen, writer, words=3)
        writer.write(b"0\r\n\r\n")

    async def _stream_error(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        await self._stream(seen, writer, words=1)
        send(writer, {"error": {"message": "the replica died", "code": 500}})
        end(writer)

    async def _bad_json(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"\r\n")
        send(writer, "{not json")
        end(writer)

    async def _bad_shape(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"\r\n")
        send(writer, {"choices": [{"delta": {"content": 3}}]})
        end(writer)

    async def _not_a_stream(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        refuse(writer, "200 OK", '{"choices": []}')

    async def _no_usage(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        await self._stream(seen, writer, usage=False)


def send(writer: asyncio.StreamWriter, event: dict[str, Any] | str) -> None:
    """One event as one chunk."""
    data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def end(writer: asyncio.StreamWriter) -> None:
    """The last event and the end of the body."""
    send(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")


def refuse(writer: asyncio.StreamWriter, status: str, body: str) -> None:
    """A plain answer."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
