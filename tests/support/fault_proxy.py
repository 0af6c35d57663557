"""An HTTP proxy in front of a real S3 server that goes wrong as a test asks, request by request.

Signatures stay valid: requests are passed on with the client's own ``Host``. What a fault does is written against an
:class:`Exchange`, so a test may bring its own.
"""

import http.client
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

ALWAYS = 1_000_000
_HOP_BY_HOP = frozenset({"connection", "expect", "keep-alive", "transfer-encoding", "content-length"})


@dataclass(frozen=True)
class Answer:
    """What the server says to one request."""

    status: int
    headers: tuple[tuple[str, str], ...]
    """Without those of the connection."""
    length: int
    """What ``Content-Length`` announces."""
    body: bytes


Fault = Callable[["Exchange"], None]
"""Deals with one request in the proxy's place."""


@dataclass
class Rule:
    """``fault`` happens to the next ``times`` requests of ``method`` whose paths contain ``match``."""

    fault: Fault
    match: str
    method: str
    times: int


class FaultProxy:
    """Passes requests on to the server on loopback's ``port``, but for those that a rule catches.

    ``requests`` has the method and path of each that came; the first rule that fits is used.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.target = port
        self.requests: list[tuple[str, str]] = []
        self.released = threading.Event()
        """Set when everything ends, so that nobody stalls longer than the test."""
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.endpoint = f"{'http' if tls is None else 'https'}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def inject(self, fault: Fault, match: str = "", times: int = ALWAYS, method: str = "GET") -> None:
        """Have ``fault`` happen, after the rules that are there."""
        with self._lock:
            self._rules.append(Rule(fault, match, method, times))

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._rules.clear()

    def count(self, match: str, method: str = "GET") -> int:
        """Requests of ``method`` whose paths contain ``match``."""
        return sum(match in path and method == one for one, path in self.requests)

    def take(self, method: str, path: str) -> Fault:
        """What happens to a request that has come now."""
        with self._lock:
            self.requests.append((method, path))
            for rule in self._rules:
                if rule.times and rule.method == method and rule.match in path:
                    rule.times -= 1
                    return rule.fault
        return sound


class Exchange:
    """One request, and the client's connection."""

    def __init__(self, proxy: FaultProxy, handler: BaseHTTPRequestHandler) -> None:
        self.proxy = proxy
        self._handler = handler
        self._body = handler.rfile.read(int(handler.headers.get("content-length", 0)))

    @cached_property
    def answer(self) -> Answer:
        """What the real server says; the request is passed on when this is asked for."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.target, timeout=60)
        upstream.putrequest(self._handler.command, self._handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self._handler.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                upstream.putheader(name, value)
        upstream.putheader("Content-Length", str(len(self._body)))
        upstream.endheaders(self._body)
        response = upstream.getresponse()
        body = response.read()
        headers = tuple((name, value) for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP)
        upstream.close()
        return Answer(response.status, headers, int(response.headers.get("content-length", len(body))), body)

    def send(self, answer: Answer) -> None:
        """Send an answer whose body may be shorter than it announces."""
        self._handler.send_response_only(answer.status)
        for name, value in answer.headers:
            self._handler.send_header(name, value)
        self._handler.send_header("Content-Length", str(answer.length))
        self._handler.end_headers()
        self._handler.wfile.write(answer.body)

    def send_first(self, share: float) -> None:
        """Send the real answer up to a share of its body; the rest is missing."""
        answer = self.answer
        self.send(Answer(answer.status, answer.headers, answer.length, answer.body[: int(len(answer.body) * share)]))

    def close(self) -> None:
        """End the connection in good order."""
        self._handler.close_connection = True

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.close()
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._handler.rfile.close()
        self._handler.connection.close()


def sound(exchange: Exchange) -> None:
    """No fault."""
    exchange.send(exchange.answer)


def slow(seconds: float) -> Fault:
    """The answer comes late."""

    def fault(exchange: Exchange) -> None:
        exchange.proxy.released.wait(seconds)
        sound(exchange)

    return fault


def refused(status: int, code: str, *, retry_after: str | None = None, message: str = "") -> Fault:
    """The server answers with an error, as S3 words it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    headers = (("Content-Type", "application/xml"), *(() if retry_after is None else (("Retry-After", retry_after),)))

    def fault(exchange: Exchange) -> None:
        exchange.send(Answer(status, headers, len(body), body))

    return fault


def reset(share: float = 0.5) -> Fault:
    """The connection is reset once ``share`` of the body was sent."""

    def fault(exchange: Exchange) -> None:
        exchange.send_first(share)
        time.sleep(0.02)  # what was sent arrives before the reset throws it away
        exchange.reset()

    return fault


def truncated(share: float = 0.5) -> Fault:
    """The body ends before the length that was announced, and the connection with it."""

    def fault(exchange: Exchange) -> None:
        exchange.send_first(share)
        exchange.close()

    return fault


def stalled(share: float = 0.5) -> Fault:
    """The body stops in the middle; the connection stays open until the proxy ends."""

    def fault(exchange: Exchange) -> None:
        exchange.send_first(share)
        exchange.proxy.released.wait(60)
        exchange.reset()

    return fault


def trickling(pause_s: float) -> Fault:
    """The body comes byte by byte, so that no read ever times out."""

    def fault(exchange: Exchange) -> None:
        exchange.send_first(0)
        for byte in exchange.answer.body:
            if exchange.proxy.released.wait(pause_s):
                break
            exchange._handler.wfile.write(bytes([byte]))
        exchange.reset()

    return fault


def trickling_headers(pause_s: float) -> Fault:
    """Headers come line by line and do not end."""

    def fault(exchange: Exchange) -> None:
        exchange._handler.send_response_only(200)
        while not exchange.proxy.released.wait(pause_s):
            exchange._handler.send_header("X-Wait", "yes")
            exchange._handler.flush_headers()
        exchange.reset()

    return fault


def flipped(share: float = 0.5) -> Fault:
    """One bit of the body is wrong."""

    def fault(exchange: Exchange) -> None:
        body = bytearray(exchange.answer.body)
        if body:
            body[int((len(body) - 1) * share)] ^= 1
        exchange.send(Answer(exchange.answer.status, exchange.answer.headers, exchange.answer.length, bytes(body)))

    return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients leave when they like."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _serve(self) -> None:
        proxy = self.server.proxy
        proxy.take(self.command, self.path)(Exchange(proxy, self))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Tests want their output clean."""
