"""A TCP proxy that breaks connections off in the middle of an answer."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self


class CutProxy:
    """Forwards loopback connections to ``port``; the first ``cuts`` that have answered ``after`` bytes are closed."""

    def __init__(self, port: int, *, cuts: int, after: int) -> None:
        self._target = port
        self._left = cuts
        self._after = after
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _spawn(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self.connections += 1
                self._spawn(self._forward, client, server, False)
                self._spawn(self._forward, server, client, True)

    def _forward(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                if answers and passed > self._after and self._take_cut():
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if answers:
            source.close()
            sink.close()

    def _take_cut(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0
